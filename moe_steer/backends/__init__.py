"""Ways of holding a model: one process, or sharded over the ranks of a run (``registry`` lists them)."""
