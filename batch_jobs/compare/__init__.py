"""Two runs side by side, and two models."""
