"""Ways of holding a model: one process, or sharded over the ranks of a run (``registry`` lists them)."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
