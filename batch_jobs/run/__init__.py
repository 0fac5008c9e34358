"""The directory of a run, and where its results come from."""
