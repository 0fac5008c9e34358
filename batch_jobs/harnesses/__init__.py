"""Steered benchmarks: lm-eval's model, Inspect's provider, and sweeps over directions and α."""
