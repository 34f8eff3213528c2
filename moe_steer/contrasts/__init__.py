"""Pairs of token sequences, and the difference of a model's activations between their two sides."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
