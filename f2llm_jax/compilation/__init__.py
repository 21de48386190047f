"""What a training step costs on machines that are not there: compiled for them, counted, and held against their limits."""
