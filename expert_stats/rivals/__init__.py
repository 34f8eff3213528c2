"""Rivals of nPMI: other measures of the same experts, and how they rank them."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
