"""The worker's process: hooks on decoder layers, one plan a step, sums and traces of readouts."""
