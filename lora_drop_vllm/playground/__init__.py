"""A page, and the same in a terminal: which tokens skipped layers, what the base model thinks."""
