"""Directions in the residual stream, from the statistics of two sides of a contrast. Arithmetic alone: no model runs
here.

Letters: N samples, T tokens, D model width, F atoms of a sparse autoencoder (SAE).
"""

from typing import TYPE_CHECKING

from moe_steer.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from moe_steer.directions.accumulate import Accumulator
    from moe_steer.directions.atom_report import report_atoms
    from moe_steer.directions.contrast import Contrast
    from moe_steer.directions.decoded_atoms import all_atoms, single_atom
    from moe_steer.directions.direction import Direction, DirectionWarning
    from moe_steer.directions.exchange import export_easyedit, export_gguf, import_easyedit, import_gguf
    from moe_steer.directions.mean_difference import caa
    from moe_steer.directions.moments import AtomMoments, Moments, PairMoments
    from moe_steer.directions.principal import pca
    from moe_steer.directions.target_atoms import sta

# No module bears the name of a function: importing it would put the module in the function's place.
_HOME = {
    "Accumulator": "accumulate",
    "AtomMoments": "moments",
    "Contrast": "contrast",
    "Direction": "direction",
    "DirectionWarning": "direction",
    "Moments": "moments",
    "PairMoments": "moments",
    "all_atoms": "decoded_atoms",
    "caa": "mean_difference",
    "export_easyedit": "exchange",
    "export_gguf": "exchange",
    "import_easyedit": "exchange",
    "import_gguf": "exchange",
    "pca": "principal",
    "report_atoms": "atom_report",
    "single_atom": "decoded_atoms",
    "sta": "target_atoms",
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
