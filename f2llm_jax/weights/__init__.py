"""Weights on disk and in memory: the Hugging Face mapping, readers of folders and checkpoints, finding a model, its digest."""
