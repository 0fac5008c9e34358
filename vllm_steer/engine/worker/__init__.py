"""The worker's side: hooks on decoder layers, one plan per step, sums and traces of readouts."""
