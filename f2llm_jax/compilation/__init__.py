"""What a training step costs on machines that are not at hand: compiled ahead of time, counted, and held against their limits."""
