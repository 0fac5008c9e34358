"""What one engine step has to do, worked out from the scheduler's token spans. Pure: no vLLM, no torch."""
