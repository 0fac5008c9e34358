"""The playground: one page that steers in the browser."""
