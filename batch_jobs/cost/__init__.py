"""What steering costs: how well the steered model still reads neutral text and answers plain questions."""
