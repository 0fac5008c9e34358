"""Fixes for faults of vLLM that affect steering, one module each, until vLLM has its own."""
