"""What answers prompts: the model in this process, an HTTP endpoint, a first letter."""
