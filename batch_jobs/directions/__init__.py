"""From contrastive texts to directions, and what held-out texts say of them."""
