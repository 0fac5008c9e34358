"""Write the report of a run: one HTML page with tables and figures."""
