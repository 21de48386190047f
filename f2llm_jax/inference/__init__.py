"""Texts to vectors with a trained model: the packed encoder, layer by layer for large models, vectors kept on disk."""
