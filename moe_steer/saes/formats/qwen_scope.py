"""Qwen-Scope (Qwen3, Qwen3.5): one layer{n}.sae.pt per layer, with or without the repository's config.json in the same folder."""

from __future__ import annotations

import re
from pathlib import Path

from moe_steer.saes.sae import SAE
from moe_steer.saes.weights import Given, check_sizes, pick, read_config, read_torch, refuse_unknown

_FILE = re.compile(r"layer(\d+)\.sae\.pt$")
_REPOSITORY = re.compile(r"([A-Za-z]+-[A-Za-z]+)-([^/]+?)-W\d+K-L0_(\d+)")


def recognises(path: Path) -> bool:
    """Such a file, or a folder with such files."""
    return bool(_FILE.search(path.name)) if not path.is_dir() else bool(_files(path))


def layers_in(path: Path) -> list[int]:
    """Layers of the SAEs in a folder."""
    return sorted(int(item.name.removeprefix("layer").partition(".")[0]) for item in _files(path))


def read(path: Path, given: Given) -> SAE:
    """TopK on the plain input; k from the repository's configuration or name. Both matrices are stored transposed."""
    weights_path = _choose(path, given.layer)
    tensors = read_torch(weights_path)
    config_path = weights_path.with_name("config.json")
    config = read_config(config_path, k=int | None, base_model=str | None) if config_path.is_file() else {}
    refuse_unknown(tensors, weights_path, "W_enc", "b_enc", "W_dec", "b_dec")
    repository = _REPOSITORY.search(weights_path.absolute().as_posix())
    if repository and repository[1] != "SAE-Res":
        raise ValueError(f"{weights_path} is of {repository[0]}: SAEs of the residual stream (SAE-Res) are read")
    k = given.k or config.get("k") or (int(repository[3]) if repository else None)
    if type(k) is not int:
        raise ValueError(
            f"the k of {weights_path} is not known: put the repository's config.json beside it, or name its folder as the repository, "
            "with W...K-L0_ and the number (from Python: load_sae(k=...))"
        )
    found = _FILE.search(weights_path.name)
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


def _files(folder: Path) -> list[Path]:
    return sorted(item for item in folder.glob("layer*.sae.pt") if _FILE.search(item.name))


def _choose(path: Path, layer: int | None) -> Path:
    if path.is_file():
        return path
    files = _files(path)
    if layer is not None:
        wanted = path / f"layer{layer}.sae.pt"
        if wanted not in files:
            raise ValueError(f"{path} has no {wanted.name}: it has {', '.join(item.name for item in files)}")
        return wanted
    if len(files) != 1:
        raise ValueError(f"{path} holds the SAEs of {len(files)} layers: say which layer, or give the file of one")
    return files[0]
