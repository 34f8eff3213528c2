"""Brings an SAE's constant scales into its weights, so that it reads and writes raw activations."""

from __future__ import annotations

import torch
from torch import Tensor


def fold_input_scale(
    W_enc_DF: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, scale_in: float, scale_out: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(W_enc, W_dec, b_dec) of the SAE that does decode(encode(x * scale_in)) / scale_out.

    The activations stay those of the scaled SAE, so b_enc and thresholds stay too. An SAE that subtracts b_dec from its
    input stays right as well where both scales are equal: x f - b = f (x - b / f).
    """
    return W_enc_DF * scale_in, W_dec_FD / scale_out, b_dec_D / scale_out


def fold_decoder_norm(W_enc_DF: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(W_enc, b_enc, W_dec) with atoms of norm 1: the same reconstruction, activations multiplied by the old norms."""
    norm_F = W_dec_FD.norm(dim=-1).clamp(min=torch.finfo(W_dec_FD.dtype).tiny ** 0.5)
    return W_enc_DF * norm_F, b_enc_F * norm_F, W_dec_FD / norm_F[:, None]
