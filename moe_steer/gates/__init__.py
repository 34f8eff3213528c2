"""When an entry of a plan acts: probes, and conditions on what is known at a token, row by row."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
