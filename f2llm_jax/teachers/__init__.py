"""Vectors of any model for every stored text of a dataset, to distil from."""
