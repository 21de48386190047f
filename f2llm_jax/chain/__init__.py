"""Commands that build on one another, each run once: the family of models, and ablations of it."""
