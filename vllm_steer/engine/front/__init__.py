"""The front end's process: requests are checked and marked here, and readouts come back here."""
