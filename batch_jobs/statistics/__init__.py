"""Statistics on plain numbers and arrays: estimates with intervals, and tests. Nothing here reads a file."""
