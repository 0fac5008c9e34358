"""Running the rows of a grid: shards, executors, what is stored."""
