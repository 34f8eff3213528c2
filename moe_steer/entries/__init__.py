"""The entries of a steering plan: what each says, whether it fits a model, and how it is read."""
