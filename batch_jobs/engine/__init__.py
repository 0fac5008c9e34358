"""The in-process engine of a study and its progress."""
