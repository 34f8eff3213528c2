"""Directions in the residual stream, from the statistics of two sides of a contrast. Arithmetic alone: no model runs here.

No module has the name of a function: importing it would replace the function.

Letters: N samples, T tokens, D model width, F atoms of a sparse autoencoder (SAE).
"""

from moe_steer.lazy_exports import stub_exports

__getattr__, __all__ = stub_exports(__name__)
