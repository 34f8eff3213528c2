"""Sparse autoencoders: read from every published format, written as SAELens folders, measured, trained."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
