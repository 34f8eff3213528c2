"""Writes an SAE as a SAELens folder (version 6): cfg.json and sae_weights.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save

from moe_steer.saes.formats.saelens import CONFIG, WEIGHTS
from moe_steer.saes.sae import SAE
from moe_steer.saes.sites import hook_of_place
from moe_steer.write_aside import write_bytes, write_text

_ARCHITECTURES = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}
_KEYS = {
    "W_enc_DF": "W_enc",
    "b_enc_F": "b_enc",
    "W_dec_FD": "W_dec",
    "b_dec_D": "b_dec",
    "threshold_F": "threshold",
    "r_mag_F": "r_mag",
    "b_mag_F": "b_mag",
}


def save_sae(sae: SAE, folder: str | os.PathLike[str]) -> Path:
    """Write the folder and return it; ``load_sae`` reads back every number as it is. A file appears complete or not at all."""
    target = Path(folder)
    keys = {**_KEYS, "b_enc_F": "b_gate"} if sae.kind == "gated" else _KEYS
    tensors = {keys[name]: tensor.detach().cpu().contiguous() for name, tensor in sae.tensors().items()}
    write_bytes(target / WEIGHTS, save(tensors))
    write_text(target / CONFIG, json.dumps(_config(sae), indent=2) + "\n")
    return target


def _config(sae: SAE) -> dict[str, Any]:
    metadata = {
        "sae_lens_version": "6.0.0",  # the version of the layout: without it the file would be read as an older one
        "model_name": sae.about.model_name,
        "hook_name": hook_of_place(sae.about.layer, sae.about.site),
    }
    return {
        "architecture": _ARCHITECTURES[sae.kind],
        "d_in": sae.d_in,
        "d_sae": sae.width,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if sae.kind == "topk" else {}),
        "metadata": metadata,
    }
