"""How a model writes its thought and its answer, and how its chat template asks for them: found by trying the template."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
