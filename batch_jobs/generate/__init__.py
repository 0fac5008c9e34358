"""Runs the rows of a grid: shards, executors, progress."""
