"""GGUF files: their header, and control vectors."""
