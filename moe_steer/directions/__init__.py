"""Directions in the residual stream, from the statistics of two sides of a contrast. Arithmetic alone: no model runs
here.

Letters: N samples, T tokens, D model width, F atoms of a sparse autoencoder (SAE).
"""

from typing import TYPE_CHECKING

from moe_steer.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from moe_steer.directions.atoms import all_atoms, report_atoms, single_atom
    from moe_steer.directions.contrast import Contrast
    from moe_steer.directions.direction import Direction, DirectionWarning
    from moe_steer.directions.exchange import export_easyedit, export_gguf, import_easyedit, import_gguf
    from moe_steer.directions.methods import caa, pca
    from moe_steer.directions.moments import Accumulator, AtomMoments, Moments, PairMoments
    from moe_steer.directions.target_atoms import sta

# No module bears the name of a function: importing it would put the module in the function's place.
_HOME = {
    "Accumulator": "moe_steer.directions.moments",
    "AtomMoments": "moe_steer.directions.moments",
    "Contrast": "moe_steer.directions.contrast",
    "Direction": "moe_steer.directions.direction",
    "DirectionWarning": "moe_steer.directions.direction",
    "Moments": "moe_steer.directions.moments",
    "PairMoments": "moe_steer.directions.moments",
    "all_atoms": "moe_steer.directions.atoms",
    "caa": "moe_steer.directions.methods",
    "export_easyedit": "moe_steer.directions.exchange",
    "export_gguf": "moe_steer.directions.exchange",
    "import_easyedit": "moe_steer.directions.exchange",
    "import_gguf": "moe_steer.directions.exchange",
    "pca": "moe_steer.directions.methods",
    "report_atoms": "moe_steer.directions.atoms",
    "single_atom": "moe_steer.directions.atoms",
    "sta": "moe_steer.directions.target_atoms",
}
__all__ = [
    "Accumulator",
    "AtomMoments",
    "Contrast",
    "Direction",
    "DirectionWarning",
    "Moments",
    "PairMoments",
    "all_atoms",
    "caa",
    "export_easyedit",
    "export_gguf",
    "import_easyedit",
    "import_gguf",
    "pca",
    "report_atoms",
    "single_atom",
    "sta",
]

__getattr__ = lazy_exports(__name__, _HOME)
