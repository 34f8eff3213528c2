"""Models behind a server: ``moe-steer serve``, and the form in which an engine takes a model."""
