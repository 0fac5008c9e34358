"""The playground: one page for steering in the browser."""
