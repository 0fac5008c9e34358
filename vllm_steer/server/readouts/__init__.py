"""The readouts of finished replies, kept for clients that drop them."""
