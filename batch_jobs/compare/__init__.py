"""Compare two runs, and two models."""
