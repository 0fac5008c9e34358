"""Scores of generated texts, from Parquet alone."""
