"""Score generated texts. The only input is their Parquet files."""
