"""The plugin's only custom op, its specification in plain torch and its fast paths."""
