"""A torch file with two linear layers: Goodfire (encoder_linear, decoder_linear), qresearch (encoder, decoder)."""

from __future__ import annotations

import re
from pathlib import Path

from moe_steer.saes.sae import SAE
from moe_steer.saes.weights import Given, pick, read_torch, refuse_unknown

_LAYER = re.compile(r"[-_]l(?:ayer)?[-_]?(\d+)(?=[-_.]|$)")


def recognises(path: Path) -> bool:
    """Any torch file: its content is checked when it is read."""
    return path.is_file() and path.suffix in (".pt", ".pth")


def read(path: Path, given: Given) -> SAE:
    """ReLU on the plain input, or TopK where ``k`` is given (Goodfire's SAEs of R1 have k 128)."""
    tensors = read_torch(path)
    pairs = (
        f"{side}{kind}.{part}"
        for side in ("encoder", "decoder")
        for kind in ("", "_linear")
        for part in ("weight", "bias")
    )
    refuse_unknown(tensors, path, *pairs)
    layer = _LAYER.search(path.name)
    return SAE(
        kind="relu" if given.k is None else "topk",
        W_enc_DF=pick(tensors, path, "encoder_linear.weight", "encoder.weight").T.contiguous(),
        b_enc_F=pick(tensors, path, "encoder_linear.bias", "encoder.bias"),
        W_dec_FD=pick(tensors, path, "decoder_linear.weight", "decoder.weight").T.contiguous(),
        b_dec_D=pick(tensors, path, "decoder_linear.bias", "decoder.bias"),
        k=given.k,
        apply_b_dec_to_input=False,
        about=given.about(
            "linear-pair", path, source=path, layer=int(layer[1]) if layer else None, site=given.site or "residual"
        ),
    )
