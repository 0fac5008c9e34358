"""Typed schemas of the configs that users write, for studies and servers."""
