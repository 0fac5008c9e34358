"""Contrastive pairs: models write them, and a check looks for defects and confounds."""
