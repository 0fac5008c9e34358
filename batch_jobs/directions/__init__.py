"""Make directions from contrastive texts and validate them on held-out texts."""
