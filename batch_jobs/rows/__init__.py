"""The grid of a study, its rows and the Parquet files that hold them."""
