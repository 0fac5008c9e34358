"""Contrastive pairs written by models, and what they give away."""
