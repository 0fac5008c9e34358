"""Contrastive pairs, scenarios and prompts."""
