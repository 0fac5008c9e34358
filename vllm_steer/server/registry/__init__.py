"""The routes under ``/v1/steering`` and the registry of directions that all API server processes share."""
