"""Faults of vLLM that steering would meet, each mended in a module of its own until vLLM does it."""
