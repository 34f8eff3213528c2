"""A sparse autoencoder (SAE) as plain tensors: encode a residual stream into atoms, decode atoms back.

Letters: T tokens, D model width, F atoms ("features"). The readers convert published files to this form:
constant normalisations are folded into the weights, thresholds are plain numbers, rows of ``W_dec_FD`` are atoms.

Names of hook points, in TransformerLens' words and in transformers', to a decoder layer and a site.
Brings an SAE's constant scales into its weights, so that it reads and writes raw activations.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_steer.json_files import quoted

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)$")
_LAYER = re.compile(r"(?:layers|h)[._](\d+)(?:\.(.+))?$")
_SITES = {
    "hook_resid_post": "residual",
    "hook_mlp_out": "mlp_out",
    "hook_attn_out": "attention_out",
    "": "residual",
    "output": "residual",
    "mlp": "mlp_out",
    "mlp.output": "mlp_out",
    "post_feedforward_layernorm.output": "mlp_out",
    "self_attn": "attention_out",
    "attn": "attention_out",
    "attention": "attention_out",
    "self_attn.output": "attention_out",
}
_HOOKS = {"residual": "hook_resid_post", "mlp_out": "hook_mlp_out", "attention_out": "hook_attn_out"}


def place_of_hook(name: str | None) -> tuple[int | None, str | None]:
    """(layer, site) of a hook point; for other sites the name itself is the site.

    The input of block N is the output of block N - 1 and gets layer N - 1.
    """
    if not name:
        return None, None
    found = _BLOCK.search(name) or _LAYER.search(name)
    if found is None:
        return None, name
    layer, rest = int(found[1]), found[2] or ""
    if rest == "hook_resid_pre" and layer > 0:
        return layer - 1, "residual"
    return layer, _SITES.get(rest, name)


def hook_of_place(layer: int | None, site: str | None) -> str | None:
    """TransformerLens' name of a layer and site; other sites are already such names."""
    if site in _HOOKS:
        return None if layer is None else f"blocks.{layer}.{_HOOKS[site]}"
    return site


def fold_input_scale(
    W_enc_DF: Tensor, W_dec_FD: Tensor, b_dec_D: Tensor, scale_in: float, scale_out: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(W_enc, W_dec, b_dec) of the SAE that does decode(encode(x * scale_in)) / scale_out.

    The activations are those of the scaled SAE, so b_enc and thresholds do not change. If both scales are equal, this also
    holds for an SAE that subtracts b_dec from its input: x f - b = f (x - b / f).
    """
    return W_enc_DF * scale_in, W_dec_FD / scale_out, b_dec_D / scale_out


def fold_decoder_norm(W_enc_DF: Tensor, b_enc_F: Tensor, W_dec_FD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(W_enc, b_enc, W_dec) with atoms of norm 1: the same reconstruction, activations multiplied by the old norms."""
    norm_F = W_dec_FD.norm(dim=-1).clamp(min=torch.finfo(W_dec_FD.dtype).tiny ** 0.5)
    return W_enc_DF * norm_F, b_enc_F * norm_F, W_dec_FD / norm_F[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class SAEAbout:
    """Origin of an SAE and the activations that it reads. None: not stated in the files."""

    format: str
    """The published format, such as ``saelens``; ``trained`` for one that was never written."""
    source: str
    """The file or folder it was read from."""
    sha256: str
    """Digest of the weights file; "" for an SAE that was never written."""
    model_name: str | None = None
    """The model whose activations it was trained on."""
    layer: int | None = None
    """Decoder layer, counted from 0."""
    site: str | None = None
    """residual: the output of a decoder layer; mlp_out; attention_out; anything else is a site that cannot be used here."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SAE:
    """``kind``: relu, jumprelu (with ``threshold_F``), topk (with ``k``), gated (with ``r_mag_F`` and ``b_mag_F``).

    ``b_enc_F`` of a gated SAE is the bias of its gate. ``apply_b_dec_to_input``: b_dec is subtracted before encoding.
    ValueError, in one line, for tensors that do not fit together.
    """

    kind: str
    W_enc_DF: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor
    apply_b_dec_to_input: bool
    about: SAEAbout
    threshold_F: Tensor | None = None
    k: int | None = None
    r_mag_F: Tensor | None = None
    b_mag_F: Tensor | None = None

    def __post_init__(self) -> None:
        where = self.about.source
        if self.kind not in _ACTIVATIONS:
            raise ValueError(f"{where}: kind {self.kind!r} is unknown: one of {', '.join(_ACTIVATIONS)} is expected")
        if self.W_enc_DF.ndim != 2:
            raise ValueError(
                f"{where}: the encoder has shape {tuple(self.W_enc_DF.shape)}: two dimensions are expected"
            )
        d_in, width = self.W_enc_DF.shape
        needed = {"jumprelu": {"threshold_F"}, "gated": {"r_mag_F", "b_mag_F"}}.get(self.kind, set())
        expected = {"b_enc_F": (width,), "W_dec_FD": (width, d_in), "b_dec_D": (d_in,)}
        for name in ("threshold_F", "r_mag_F", "b_mag_F"):
            if (name in needed) != (getattr(self, name) is not None):
                raise ValueError(
                    f"{where}: a {self.kind} SAE {'needs' if name in needed else 'has no'} {name}: check the format"
                )
            if name in needed:
                expected[name] = (width,)
        for name, shape in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(
                    f"{where}: {name} has shape {found}, with an encoder of {d_in} x {width} it should be {shape}: check the format"
                )
        if (self.kind == "topk") != (self.k is not None):
            raise ValueError(
                f"{where}: k is {quoted(self.k)} in a {self.kind} SAE: topk needs it, the other kinds have none"
            )
        if self.k is not None and not 1 <= self.k <= width:
            raise ValueError(f"{where}: k is {quoted(self.k)}: give 1 to {width}, the number of atoms")

    @property
    def d_in(self) -> int:
        """D, the width of its input."""
        return self.W_enc_DF.shape[0]

    @property
    def width(self) -> int:
        """F, the number of atoms."""
        return self.W_enc_DF.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of its computations."""
        return self.W_enc_DF.dtype

    @property
    def device(self) -> torch.device:
        """Device of its tensors."""
        return self.W_enc_DF.device

    def encode(self, x_TD: Tensor) -> Tensor:
        """Activations of all atoms, [T, F] (or [..., F] for an input [..., D]), in the SAE's precision.

        Needs about 2 T F numbers: encode many tokens in chunks. ValueError for another width.
        """
        if x_TD.shape[-1] != self.d_in:
            raise ValueError(
                f"activations of width {x_TD.shape[-1]} meet an SAE of width {self.d_in} ({self.about.source}): it belongs to another model"
            )
        x_TD = x_TD.to(device=self.device, dtype=self.dtype)
        if self.apply_b_dec_to_input:
            x_TD = x_TD - self.b_dec_D
        flat_TD = x_TD.reshape(-1, self.d_in)
        acts_TF = _ACTIVATIONS[self.kind](self, flat_TD)
        return acts_TF.reshape(*x_TD.shape[:-1], self.width)

    def decode(self, acts_TF: Tensor) -> Tensor:
        """The reconstruction [T, D] of activations [T, F]."""
        return acts_TF.to(device=self.device, dtype=self.dtype) @ self.W_dec_FD + self.b_dec_D

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        """The same SAE on another device or in another precision; itself if nothing changes."""
        changed = {name: value.to(device=device, dtype=dtype) for name, value in self.tensors().items()}
        if all(changed[name] is value for name, value in self.tensors().items()):
            return self
        return dataclasses.replace(self, **changed)  # type: ignore[arg-type]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by their field name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _preactivations(sae: SAE, x_TD: Tensor) -> Tensor:
    return torch.addmm(sae.b_enc_F, x_TD, sae.W_enc_DF)


def _relu(sae: SAE, x_TD: Tensor) -> Tensor:
    return _preactivations(sae, x_TD).relu_()


def _jumprelu(sae: SAE, x_TD: Tensor) -> Tensor:
    """relu(z) where z > threshold, else 0 (arXiv 2407.14435)."""
    assert sae.threshold_F is not None
    z_TF = _preactivations(sae, x_TD).relu_()
    return z_TF.mul_(
        torch.gt(z_TF, sae.threshold_F, out=torch.empty_like(z_TF))
    )  # 8 times as fast as masked_fill on a CPU


def _topk(sae: SAE, x_TD: Tensor) -> Tensor:
    """relu of the k largest of each token (arXiv 2406.04093)."""
    assert sae.k is not None
    z_TF = _preactivations(sae, x_TD)
    top_TK, ids_TK = z_TF.topk(sae.k, dim=-1, sorted=False)
    return z_TF.zero_().scatter_(-1, ids_TK, top_TK.relu_())


def _gated(sae: SAE, x_TD: Tensor) -> Tensor:
    """relu(x W exp(r_mag) + b_mag) where x W + b_gate > 0 (arXiv 2404.16014)."""
    assert sae.r_mag_F is not None
    assert sae.b_mag_F is not None
    shared_TF = x_TD @ sae.W_enc_DF
    open_TF = (shared_TF + sae.b_enc_F).gt_(0)
    return shared_TF.mul_(sae.r_mag_F.exp()).add_(sae.b_mag_F).relu_().mul_(open_TF)


_ACTIVATIONS: dict[str, Callable[[SAE, Tensor], Tensor]] = {
    "relu": _relu,
    "jumprelu": _jumprelu,
    "topk": _topk,
    "gated": _gated,
}
