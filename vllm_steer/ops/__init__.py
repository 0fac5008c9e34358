"""The one custom op of the plugin, its plain-torch specification and its fast paths."""
