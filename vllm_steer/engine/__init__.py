"""The code that runs inside vLLM's engine: admission in the front end, hooks and readouts in the workers.

``vllm_api.py`` lists the names of vLLM 0.32 that this package and ``vllm_steer.server`` use. Every function of vLLM
that they replace and every attribute that they write on a vLLM object is declared through ``patching.py``, with its
reason, and listed in ``docs/patches.md``. Only these two packages import vLLM.

``front`` and ``worker`` do not import each other; ``resolved_spec`` and ``worker_answers`` define the data that they
exchange. ``worker`` wraps the classic runner method by method and gives the V2 runner its own ``ModelState``.
"""
