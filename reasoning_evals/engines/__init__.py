"""Samplers: a model in this process, a server behind HTTP, and the probability of the first letter of an answer."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
