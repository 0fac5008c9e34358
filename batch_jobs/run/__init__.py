"""The directory of a run, and the provenance of its results."""
