"""Hard negatives: vectors on disk, exact nearest neighbours by blocks, selection, and what is written of it."""
