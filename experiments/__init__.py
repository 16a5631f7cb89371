"""Experiments: the papers' numbers, and our speed against peers. Runs from the checkout."""
