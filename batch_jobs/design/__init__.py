"""The design of a study before it runs: what it will generate, what that takes, and what it can show."""
