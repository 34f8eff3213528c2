"""Causes: what turning each expert up or down does to an outcome of the user's choice."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
