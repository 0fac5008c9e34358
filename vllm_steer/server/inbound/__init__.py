"""Incoming requests: their routes, their bodies and misplaced fields in them."""
