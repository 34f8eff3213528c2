"""EleutherAI's sparsify: cfg.json and sae.safetensors in a folder named like the module it reads."""

from __future__ import annotations

from pathlib import Path

from moe_steer.json_files import quoted
from moe_steer.saes.sae import SAE, place_of_hook
from moe_steer.saes.weights import Given, check_sizes, pick, read_config, read_safetensors, refuse_unknown

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def recognises(path: Path) -> bool:
    """A folder with both files."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read(path: Path, given: Given) -> SAE:
    """TopK on x - b_dec. The rows of W_dec are atoms. ValueError for transcoders and for other activations."""
    config = read_config(path / CONFIG, transcode=bool | None, skip_connection=bool | None, signed=bool | None)
    weights_path = path / WEIGHTS
    if config.get("signed") or config.get("activation", "topk") != "topk":
        what = "signed set" if config.get("signed") else f"the activation {quoted(config['activation'])}"
        raise ValueError(f"{path} has {what}: TopK autoencoders without it are read")
    k = given.k or config.get("k")
    if type(k) is not int:
        raise ValueError(f"{path / CONFIG} gives k as {quoted(k)}: pass k, the number of active atoms a token")
    tensors = read_safetensors(weights_path)
    refuse_unknown(tensors, weights_path, "encoder.weight", "encoder.bias", "W_dec", "b_dec")
    layer, site = place_of_hook(path.absolute().name)
    run_config = path.absolute().parent / "config.json"
    model_name = read_config(run_config, model=str | None).get("model") if run_config.is_file() else None
    sae = SAE(
        kind="topk",
        W_enc_DF=pick(tensors, weights_path, "encoder.weight").T.contiguous(),
        b_enc_F=pick(tensors, weights_path, "encoder.bias"),
        W_dec_FD=pick(tensors, weights_path, "W_dec"),
        b_dec_D=pick(tensors, weights_path, "b_dec"),
        k=k,
        apply_b_dec_to_input=True,
        about=given.about("sparsify", weights_path, source=path, model_name=model_name, layer=layer, site=site),
    )
    return check_sizes(sae, path / CONFIG, config)
