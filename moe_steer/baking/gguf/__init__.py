"""The GGUF container."""
