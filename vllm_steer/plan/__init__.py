"""Builds the tables of each engine step from the scheduler's token spans. Pure: no vLLM, no torch."""
