"""Reading SAE files: safetensors, npz, and torch files (pickles with nothing but tensors)."""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moe_steer.files import load_plain, tensor_places
from moe_steer.json_files import check_types, quoted, read_json, short
from moe_steer.saes.sae import SAE, SAEAbout

_WIDTHS_IN = ("d_in", "d_model", "activation_dim")
_NUMBERS_OF_ATOMS = ("d_sae", "num_latents", "dict_size")
_SIZES = (*_WIDTHS_IN, *_NUMBERS_OF_ATOMS, "d_out")
_PLACES = (
    (
        ("hook_name", "hook_point", "hook_point_in", "hf_hook_point_in", "hook_name_in"),
        ("hook_name_out", "hook_point_out", "hf_hook_point_out", "out_hook_point"),
    ),
    (("hook_layer", "hook_point_layer", "layer"), ("hook_layer_out", "hook_point_layer_out", "out_hook_point_layer")),
    (("d_in", "d_model"), ("d_out",)),
)
"""Keys of what an SAE reads, and of what it writes."""
_TYPES: dict[str, Any] = {
    **dict.fromkeys((*_SIZES, "hook_layer", "hook_point_layer", "k"), int | None),
    **dict.fromkeys(
        ("model_type", "type", "sae_type", "dict_class", "model_name", "hook_name", "hook_point"), str | None
    ),
}
"""Of keys that any format may read, wherever they stand."""
_OTHER_KINDS = re.compile(r"transcoder|cross.?(?:coder|layer)|\bclt\b|lorsa|molt|skip", re.IGNORECASE)
_OTHER_MARKS = re.compile(r"transcode|skip_connection|affine|W_skip|use_skip", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """Facts about an SAE from the caller, where its files do not state them."""

    layer: int | None = None
    site: str | None = None
    k: int | None = None
    model_name: str | None = None

    def agreed_layer(self, found: int | None, path: Path) -> int | None:
        """The layer from the caller or the files; ValueError if both exist and differ."""
        if None not in (self.layer, found) and self.layer != found:
            raise ValueError(
                f"{path} says that it belongs to layer {found}, not {self.layer}: take the SAE of that layer"
            )
        return found if self.layer is None else self.layer

    def agreed_site(self, found: str | None, path: Path) -> str | None:
        """The site from the caller or the files; ValueError if both exist and differ."""
        if None not in (self.site, found) and self.site != found:
            raise ValueError(f"{path} says that it reads {found}, not {self.site}: take an SAE of that site")
        return self.site or found

    def about(
        self,
        format: str,
        weights: Path,
        *,
        source: Path,
        model_name: str | None = None,
        layer: int | None = None,
        site: str | None = None,
    ) -> SAEAbout:
        """Where an SAE comes from: the facts of its files (``model_name``, ``layer``, ``site``), completed by the caller's."""
        return SAEAbout(
            format=format,
            source=str(source),
            sha256=sha256_of(weights),
            model_name=self.model_name or model_name,
            layer=self.agreed_layer(layer, source),
            site=self.agreed_site(site, source),
        )


def read_config(path: Path, **types: Any) -> dict[str, Any]:
    """A JSON object, with the types of the values that are read from it; ValueError, in one line, for anything else, and for
    what is no autoencoder of one place (``_refuse_two_places``)."""
    config = read_json(path, "download it again", types)
    for name, inner in (("", config), *((key, value) for key, value in config.items() if isinstance(value, dict))):
        where = f"{path}, {name}" if name else str(path)
        check_types(inner, where, _TYPES)
        for key, value in inner.items():
            if isinstance(value, str) and value.strip().lower() in ("true", "false"):
                raise ValueError(f"{where}: {key!r} is the text {value!r}: give true or false, without quotes")
    _refuse_two_places(path, {**config, **(config.get("metadata") or {})})
    return config


def _refuse_two_places(path: Path, config: Mapping[str, Any]) -> None:
    """ValueError for transcoders, crosscoders and the like: they read one place and write another, so that the difference
    between what they read and what they give says nothing."""
    for key in ("architecture", "type", "sae_type", "model_type", "dict_class"):
        if isinstance(config.get(key), str) and _OTHER_KINDS.search(config[key]):
            raise ValueError(f"{path} holds a {quoted(config[key])}: it is no autoencoder of one place, take an SAE")
    for key, value in config.items():
        if _OTHER_MARKS.search(key) and value not in (None, False):
            raise ValueError(
                f"{path} has {short(key)} set: it is a transcoder or has a skip connection, take an SAE without"
            )
    for inward, outward in _PLACES:
        source = next((config[key] for key in inward if config.get(key) is not None), None)
        target = next((config[key] for key in outward if config.get(key) is not None), source)
        if target != source:
            raise ValueError(
                f"{path} is a transcoder from {short(source)} to {short(target)}: take an SAE (resid_post, mlp_out)"
            )


def check_sizes(sae: SAE, path: Path, config: Mapping[str, Any]) -> SAE:
    """The SAE itself; ValueError where the configuration states other sizes than the weights have."""
    for key, found in {**dict.fromkeys(_WIDTHS_IN, sae.d_in), **dict.fromkeys(_NUMBERS_OF_ATOMS, sae.width)}.items():
        if config.get(key) and config[key] != found:
            raise ValueError(
                f"{path} gives {key} as {short(config[key])}, the weights have {found}: download both again"
            )
    return sae


def refuse_unknown(tensors: Mapping[str, Tensor], path: Path, *known: str) -> None:
    """ValueError for tensors that the format does not have: whatever they do, it would be left out. Scales of ones do nothing."""
    for name in sorted(set(tensors).difference(known)):
        if "scal" in name and bool((tensors[name] == 1).all()):
            continue
        raise ValueError(
            f"{path} holds the tensor {short(name)}, which is not of an SAE that is read here: a transcoder, a skip connection, "
            "or a scale that was not folded in?"
        )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; ValueError if it is missing or damaged."""
    try:
        tensor_places(path)  # the library takes the last of two tensors of one name
        return load_file(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, ValueError, RuntimeError, OverflowError) as error:  # the last for sizes of no tensor
        raise ValueError(f"{path} is damaged ({short(error)}): download it again") from error


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of an npz file; pickles, which the format allows, are refused."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as npz: {short(error)}") from error


def read_torch(path: Path) -> dict[str, Tensor]:
    """The tensors of a torch file, also from one level down (``state_dict``). No code of the file is run."""
    value = load_plain(path)
    if isinstance(value, Mapping) and isinstance(value.get("state_dict"), Mapping):
        value = value["state_dict"]
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} holds a {type(value).__name__}: a mapping of names to tensors is expected")
    return {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}


_MAY_BE_LEAST = ("b_enc", "encoder.bias", "encoder_linear.bias", "log_jumprelu_threshold")


def pick(tensors: Mapping[str, Tensor], path: Path, *names: str) -> Tensor:
    """The first of these tensors that exists, in 32 bits if it was stored in 16; ValueError names missing ones, and one that holds
    whole numbers, NaN or infinities."""
    for name in names:
        if name in tensors:
            found = tensors[name]
            if not found.is_floating_point():
                raise ValueError(
                    f"{path} holds {name} as {found.dtype}: numbers with a point are expected, download it again"
                )
            found = widen(found)
            low, high = map(float, torch.aminmax(found)) if found.numel() else (0.0, 0.0)  # NaN where a number is
            # A threshold without a limit, or such a bias, is that of an atom that never acts; the logarithm of 0 has none either.
            least = low == -math.inf and name.endswith(_MAY_BE_LEAST)
            if not ((low > -math.inf or least) and (high < math.inf or "threshold" in name)):
                raise ValueError(f"{path} holds numbers that are NaN or infinite in {name}: download it again")
            return found
    raise ValueError(
        f"{path} has no tensor {' or '.join(names)}, it has {short(', '.join(sorted(tensors)))}: another format?"
    )


def widen(tensor: Tensor) -> Tensor:
    """16-bit numbers as float32: exact, and sums over thousands of atoms need the precision."""
    return tensor.contiguous() if tensor.dtype in (torch.float32, torch.float64) else tensor.float().contiguous()


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
