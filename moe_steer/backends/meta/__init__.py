"""Models on the meta device: what is asked there, and what it counts as."""
