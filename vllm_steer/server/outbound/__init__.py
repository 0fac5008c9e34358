"""Outgoing replies: readouts and traces beside vLLM's own fields, refusals, and event streams."""
