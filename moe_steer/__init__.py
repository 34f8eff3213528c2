"""Changes models at inference and knows their insides: observe routing, steer experts and the residual stream."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
