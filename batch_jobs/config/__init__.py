"""What people write: study and server configs, typed."""
