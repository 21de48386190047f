"""What a training step reads: prepared records, the order they come in, packing, the pipeline."""
