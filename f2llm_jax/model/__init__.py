"""What is trained: the eight sizes, the Qwen3 decoder, the encoder around it, and the Hugging Face weight table."""
