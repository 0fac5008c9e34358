"""The only package that imports vLLM.

What it takes from vLLM 0.32 stands in ``foreign.py``; each function that it replaces and each attribute that it writes
on an object of vLLM's is declared through ``patching.py``, with its reason, and listed in ``docs/patches.md``.

The patches of a runner go with that runner: the classic one is wrapped method by method, the rest of what the V2 runner
needs is in its ``ModelState``.
"""
