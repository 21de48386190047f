"""From raw files to a prepared dataset: reading, cleaning, the catalogue, the TFDS builder, the tables next to its records."""
