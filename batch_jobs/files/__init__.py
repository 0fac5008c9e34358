"""Reading and writing files: documents, JSON lines, atomic replacement."""
