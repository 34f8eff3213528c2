"""Small SAEs of every kind."""

from __future__ import annotations

import sae_files as files
from moe_steer.saes import SAE, SAEAbout

ABOUT = SAEAbout(format="test", source="here", sha256="", layer=3, site="residual")


def make(kind: str = "topk", seed: int = 0, **changes: object) -> SAE:
    w = {name: files.tensor(value) for name, value in files.draw(seed).items()}
    extras = {
        "relu": {},
        "topk": {"k": 3},
        "jumprelu": {"threshold_F": w["threshold"]},
        "gated": {"r_mag_F": w["r_mag"], "b_mag_F": w["b_mag"]},
    }[kind]
    fields = {
        "kind": kind,
        "W_enc_DF": w["enc"],
        "b_enc_F": w["b_enc"],
        "W_dec_FD": w["dec"],
        "b_dec_D": w["b_dec"],
        "apply_b_dec_to_input": True,
        "about": ABOUT,
        **extras,
        **changes,
    }
    return SAE(**fields)  # type: ignore[arg-type]
