"""Which token is what: markers, thoughts, sentences, padding, prompts; and traces of generated tokens."""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
