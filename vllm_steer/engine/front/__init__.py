"""The front end's side: checks and marks requests, and receives their readouts."""
