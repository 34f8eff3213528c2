"""The published collections.

Gemma Scope (Gemma 2): only params.npz; model, layer and site are in the download path. Gemma Scope 2 (Gemma 3): the same
tensors in params.safetensors, and config.json.

Llama Scope (Llama-3.1-8B base): hyperparams.json and checkpoints/final.safetensors. The SAE was trained on inputs scaled to a
mean norm of sqrt(D); both that scale and the decoder norms, which the threshold is compared with, are folded in here. The scalar
threshold in the file is in units of the raw activations, as its growth with the layer's mean norm shows (layers 8, 15, 24: 0.20,
0.33, 0.75 at norms 6.3, 10.8, 29.1), so it is scaled too. Llama Scope R1 (DeepSeek-R1-Distill-Llama-8B): the same, but with the
logarithm of one threshold per atom, and with the mean norms of the activations as tensors.

Qwen-Scope (Qwen3, Qwen3.5): one layer{n}.sae.pt per layer, with or without the repository's config.json in the same folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_steer.json_files import is_number, quoted
from moe_steer.saes.sae import SAE, fold_decoder_norm, fold_input_scale, place_of_hook
from moe_steer.saes.weights import (
    Given,
    check_sizes,
    pick,
    read_config,
    read_npz,
    read_safetensors,
    read_torch,
    refuse_unknown,
)

GEMMA, GEMMA_2 = ("params.npz",), ("config.json", "params.safetensors")
# The attention SAEs read the concatenated heads before the output projection, which is not the attention's output.
_GEMMA_SITES = {"res": "residual", "mlp": "mlp_out", "att": "blocks.{}.attn.hook_z"}
_GEMMA_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-([\w-]+)")
LLAMA = ("hyperparams.json", "checkpoints/final.safetensors")
LLAMA_R1 = ("config.json", "sae_weights.safetensors")
_NORM = "dataset_average_activation_norm."
_LLAMA_TYPES: dict[str, Any] = {
    "d_model": int,
    "use_glu_encoder": bool | None,
    "apply_decoder_bias_to_pre_encoder": bool | None,
    "sparsity_include_decoder_norm": bool,
    "hook_point_in": str | None,
}
_QWEN_FILE = re.compile(r"layer(\d+)\.sae\.pt$")
_QWEN_REPOSITORY = re.compile(r"([A-Za-z]+-[A-Za-z]+)-([^/]+?)-W\d+K-L0_(\d+)")


def read_gemma(path: Path, given: Given) -> SAE:
    """ValueError for the transcoders, crosscoders and so on of the same collection, whose tensors look the same."""
    where = path.absolute().as_posix()
    repository, layer = _GEMMA_REPOSITORY.search(where), re.search(r"/layer_(\d+)(?:/|$)", where)
    model_name, site = None, None
    if "transcoder" in "/".join(path.absolute().parts[-4:]).lower():
        raise ValueError(f"{path} holds a transcoder, from one place of the model to another: take an SAE (res, mlp)")
    if repository:
        kind = re.match("(?:res|mlp|att)(?![a-z])", repository[3])
        if kind is None:
            raise ValueError(
                f"{path} is of {repository[0]}: SAEs of {', '.join(_GEMMA_SITES)} are read, no transcoders"
            )
        site = _GEMMA_SITES[kind[0]].format(layer[1] if layer else "?")
        if "/embedding/" in f"{where}/":
            site = "hook_embed"
        model_name = f"google/gemma-2-{repository[1]}{'-it' if repository[2] == 'it' else ''}"
    return _gemma(
        "gemma-scope",
        path,
        path / GEMMA[0],
        read_npz(path / GEMMA[0]),
        given,
        model_name,
        int(layer[1]) if layer else None,
        site,
    )


def read_gemma_2(path: Path, given: Given) -> SAE:
    """ValueError for the transcoders of the same collection, which map one site to another."""
    types = {"hf_hook_point_in": str, "affine_connection": bool, "model_name": str, "width": int}
    config_path, weights_path = (path / name for name in GEMMA_2)
    config = read_config(config_path, **{name: kind | None for name, kind in types.items()})
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(f"{path} has the architecture {quoted(config['architecture'])}: jump_relu is expected")
    tensors = read_safetensors(weights_path)
    layer, site = place_of_hook(config.get("hf_hook_point_in"))
    sae = _gemma("gemma-scope-2", path, weights_path, tensors, given, config.get("model_name"), layer, site)
    return check_sizes(sae, config_path, {**config, "d_sae": config.get("width")})


def _gemma(
    format: str,
    path: Path,
    where: Path,
    tensors: Mapping[str, Tensor],
    given: Given,
    model_name: str | None,
    layer: int | None,
    site: str | None,
) -> SAE:
    """JumpReLU; b_dec is not subtracted from the input (arXiv 2408.05147)."""
    refuse_unknown(tensors, where, "w_enc", "W_enc", "w_dec", "W_dec", "b_enc", "b_dec", "threshold")
    return SAE(
        kind="jumprelu",
        W_enc_DF=pick(tensors, where, "w_enc", "W_enc"),
        b_enc_F=pick(tensors, where, "b_enc"),
        W_dec_FD=pick(tensors, where, "w_dec", "W_dec"),
        b_dec_D=pick(tensors, where, "b_dec"),
        threshold_F=pick(tensors, where, "threshold"),
        apply_b_dec_to_input=False,
        about=given.about(format, where, source=path, model_name=model_name, layer=layer, site=site),
    )


def read_llama(path: Path, given: Given) -> SAE:
    """ValueError for Llama Scope's other kinds (transcoders, per-token normalisation, GLU encoders)."""
    config_path, weights_path = (path / name for name in LLAMA)
    config = read_config(
        config_path, **_LLAMA_TYPES, dataset_average_activation_norm=dict | None, jump_relu_threshold=float
    )
    norms = config.get("dataset_average_activation_norm") or {}
    scale = _scale_of(path, config, norms.get("in"))
    if "jump_relu_threshold" not in config:
        raise ValueError(f"{config_path} gives no jump_relu_threshold: download it again")
    threshold = float(config["jump_relu_threshold"]) * scale
    tensors = read_safetensors(weights_path)
    return _llama(
        path, config, tensors, weights_path, scale, threshold, "llama-scope", "meta-llama/Llama-3.1-8B", given
    )


def read_llama_r1(path: Path, given: Given) -> SAE:
    """The thresholds are those of the scaled SAE, so they are only exponentiated."""
    config_path, weights_path = (path / name for name in LLAMA_R1)
    config = read_config(config_path, **_LLAMA_TYPES)
    tensors = read_safetensors(weights_path)
    mean_norm = tensors.get(f"{_NORM}{config.get('hook_point_in')}")
    scale = _scale_of(path, config, mean_norm.item() if mean_norm is not None and mean_norm.numel() == 1 else None)
    threshold_F = pick(tensors, weights_path, "log_jumprelu_threshold").exp()
    model_name = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    return _llama(path, config, tensors, weights_path, scale, threshold_F, "llama-scope-r1", model_name, given)


def _scale_of(path: Path, config: dict[str, Any], mean_norm: Any) -> float:
    """The factor of the inputs, sqrt(D) / mean norm; ValueError for anything but a JumpReLU SAE of this kind."""
    if config.get("act_fn", "jumprelu") != "jumprelu":
        raise ValueError(f"{path} has the activation {quoted(config['act_fn'])}: jumprelu is expected")
    if config.get("use_glu_encoder") or config.get("apply_decoder_bias_to_pre_encoder"):
        raise ValueError(f"{path} has a GLU encoder or subtracts its decoder bias: Llama Scope's published SAEs do not")
    normalised = config.get("norm_activation", "dataset-wise")
    if normalised == "inference":
        return 1.0
    if normalised != "dataset-wise":
        raise ValueError(f"{path} normalises activations {quoted(normalised)}: dataset-wise is expected")
    if not is_number(mean_norm) or not mean_norm > 0:
        raise ValueError(f"{path} gives the mean activation norm as {quoted(mean_norm)}: a number above 0 is expected")
    if config.get("d_model", 0) < 1:
        raise ValueError(f"{path} gives d_model as {config.get('d_model')}: the width of the model is expected")
    return math.sqrt(config["d_model"]) / mean_norm


def _llama(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    weights_path: Path,
    scale: float,
    threshold: float | Tensor,
    format: str,
    model_name: str,
    given: Given,
) -> SAE:
    """The SAE for raw activations, from tensors for scaled ones; ``threshold`` is in the scaled SAE's units."""
    known = [f"{side}.{part}" for side in ("encoder", "decoder") for part in ("weight", "bias")]
    refuse_unknown(
        tensors, weights_path, *known, "log_jumprelu_threshold", *(k for k in tensors if k.startswith(_NORM))
    )
    encoder = pick(tensors, weights_path, "encoder.weight").T.contiguous()
    decoder = pick(tensors, weights_path, "decoder.weight").T.contiguous()
    bias = pick(tensors, weights_path, "encoder.bias")
    threshold_F = bias.new_zeros(len(bias)) + threshold
    if config.get(
        "sparsity_include_decoder_norm", True
    ):  # the published default: activations count times their atom's norm
        encoder, bias, decoder = fold_decoder_norm(encoder, bias, decoder)
    encoder, decoder, b_dec = fold_input_scale(
        encoder, decoder, pick(tensors, weights_path, "decoder.bias"), scale, scale
    )
    layer, site = place_of_hook(config.get("hook_point_in"))
    sae = SAE(
        kind="jumprelu",
        W_enc_DF=encoder,
        b_enc_F=bias,
        W_dec_FD=decoder,
        b_dec_D=b_dec,
        threshold_F=threshold_F,
        apply_b_dec_to_input=False,
        about=given.about(format, weights_path, source=path, model_name=model_name, layer=layer, site=site),
    )
    return check_sizes(sae, path, config)


def is_qwen(path: Path) -> bool:
    """Such a file, or a folder with such files."""
    return bool(_QWEN_FILE.search(path.name)) if not path.is_dir() else bool(_qwen_files(path))


def qwen_layers(path: Path) -> list[int]:
    """Layers of the SAEs in a folder."""
    return sorted(int(item.name.removeprefix("layer").partition(".")[0]) for item in _qwen_files(path))


def read_qwen(path: Path, given: Given) -> SAE:
    """TopK on the plain input; k from the repository's configuration or name. Both matrices are stored transposed."""
    weights_path = _qwen_choice(path, given.layer)
    tensors = read_torch(weights_path)
    config_path = weights_path.with_name("config.json")
    config = read_config(config_path, k=int | None, base_model=str | None) if config_path.is_file() else {}
    refuse_unknown(tensors, weights_path, "W_enc", "b_enc", "W_dec", "b_dec")
    repository = _QWEN_REPOSITORY.search(weights_path.absolute().as_posix())
    if repository and repository[1] != "SAE-Res":
        raise ValueError(f"{weights_path} is of {repository[0]}: SAEs of the residual stream (SAE-Res) are read")
    k = given.k or config.get("k") or (int(repository[3]) if repository else None)
    if type(k) is not int:
        raise ValueError(
            f"the k of {weights_path} is not known: put the repository's config.json beside it, or name its folder as the repository, "
            "with W...K-L0_ and the number (from Python: load_sae(k=...))"
        )
    found = _QWEN_FILE.search(weights_path.name)
    model_name = config.get("base_model") or (f"Qwen/{repository[2]}" if repository else None)
    sae = SAE(
        kind="topk",
        W_enc_DF=pick(tensors, weights_path, "W_enc").T.contiguous(),
        b_enc_F=pick(tensors, weights_path, "b_enc"),
        W_dec_FD=pick(tensors, weights_path, "W_dec").T.contiguous(),
        b_dec_D=pick(tensors, weights_path, "b_dec"),
        k=k,
        apply_b_dec_to_input=False,
        about=given.about(
            "qwen-scope",
            weights_path,
            source=weights_path,
            model_name=model_name,
            layer=int(found[1]) if found else None,
            site="residual",
        ),
    )
    return check_sizes(sae, config_path, config)


def _qwen_files(folder: Path) -> list[Path]:
    return sorted(item for item in folder.glob("layer*.sae.pt") if _QWEN_FILE.search(item.name))


def _qwen_choice(path: Path, layer: int | None) -> Path:
    if path.is_file():
        return path
    files = _qwen_files(path)
    if layer is not None:
        wanted = path / f"layer{layer}.sae.pt"
        if wanted not in files:
            raise ValueError(f"{path} has no {wanted.name}: it has {', '.join(item.name for item in files)}")
        return wanted
    if len(files) != 1:
        raise ValueError(f"{path} holds the SAEs of {len(files)} layers: say which layer, or give the file of one")
    return files[0]
