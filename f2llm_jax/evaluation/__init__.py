"""Texts to vectors with a finished model, and what those vectors are worth."""
