"""A client of chat endpoints."""
