"""Measures routing: which experts fire at reasoning markers, how sure that is, and which ones to steer."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
