"""Text-embedding models trained by the F2LLM-v2 recipe in JAX, from raw rows to a Hugging Face release."""

__version__ = "0.1.0"
