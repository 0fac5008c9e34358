"""Everything inside vLLM's engine: admission in the front end, hooks and readouts in the workers.

``vllm_names.py`` lists what this package and ``vllm_steer.server`` take from vLLM 0.32. Each function that they replace
and each attribute that they write on an object of vLLM's is declared through ``patching.py``, with its reason, and
listed in ``docs/patches.md``. Only these two packages import vLLM.

``front`` and ``worker`` do not import each other: what crosses between them is in ``resolved_spec`` and
``worker_answers``. ``worker`` wraps the classic runner method by method; the V2 runner gets its own ``ModelState``.
"""
