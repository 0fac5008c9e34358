"""A request on its way in: which route it came to, what its body asks, what is misplaced in it."""
