"""What is trained: the eight sizes, the Qwen3 decoder and the encoder around it."""
