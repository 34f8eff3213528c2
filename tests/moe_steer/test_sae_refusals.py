"""What is no autoencoder of one place, or contradicts itself, is refused in one line that names the file; its neighbours are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae_files as files
from moe_steer.layers import ModelShape
from moe_steer.saes import check_fits, load_sae

D, F = files.D, files.F
Write = Callable[[Path], Path]


def saelens(root: Path, architecture: str = "standard", **changes: Any) -> Path:
    return files.saelens(root, architecture, **changes).path


def place(**metadata: Any) -> dict[str, Any]:
    return {"metadata": {"model_name": "m", "hook_name": "blocks.3.hook_resid_post", **metadata}}


def holding(write: Write, name: str, tensor: torch.Tensor) -> Write:
    """The same with one more tensor."""

    def build(root: Path) -> Path:
        path = write(root)
        path = next(path.rglob("*.safetensors")) if path.is_dir() and list(path.rglob("*.safetensors")) else path
        if path.suffix == ".safetensors":
            save_file({**load_file(path), name: tensor}, path)
            return path.parent.parent if path.parent.name == "checkpoints" else path.parent
        path = path / "ae.pt" if path.is_dir() and (path / "ae.pt").exists() else path
        if path.is_dir():
            arrays = dict(np.load(path / "params.npz"))
            np.savez(path / "params.npz", **{**arrays, name: tensor.numpy()})
            return path
        torch.save({**torch.load(path), name: tensor}, path)
        return path if path.name != "ae.pt" else path.parent

    return build


def gemma(folder: str, **extra: Any) -> Write:
    def build(root: Path) -> Path:
        source = files.gemma_scope(root).path / "params.npz"
        target = root / folder
        target.mkdir(parents=True)
        np.savez(target / "params.npz", **{**np.load(source), **extra})
        return target

    return build


def learned(**changes: Any) -> Write:
    """dictionary_learning, with changes to the configuration; those of its trainer under ``trainer``."""

    def build(root: Path) -> Path:
        path = files.dictionary_learning(root).path
        config = json.loads((path / "config.json").read_text())
        config["trainer"] |= changes.pop("trainer", {})
        (path / "config.json").write_text(json.dumps({**config, **changes}))
        return path

    return build


def qwen(name: str = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3", **config: Any) -> Write:
    def build(root: Path) -> Path:
        path = files.qwen_scope(root, config=True).path
        beside = path.with_name("config.json")
        beside.write_text(json.dumps({**json.loads(beside.read_text()), **config}))
        return path.parent.rename(path.parent.with_name(name)) / path.name

    return build


def of(write: Callable[..., files.Published], *given: Any, **changes: Any) -> Write:
    return lambda root: write(root, *given, **changes).path


SKIP, BIAS = torch.ones(D, D), torch.zeros(D)
READERS: dict[str, Write] = {
    "saelens": saelens,
    "gemma scope": gemma("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_50"),
    "gemma scope 2": of(files.gemma_scope_2),
    "llama scope": of(files.llama_scope),
    "llama scope r1": of(files.llama_scope_r1),
    "sparsify": of(files.sparsify),
    "dictionary_learning": learned(),
    "qwen scope": of(files.qwen_scope),
    "linear pair": of(files.goodfire),
}
REFUSED: dict[str, tuple[Write, str]] = {
    **{f"{name}, a skip matrix": (holding(write, "W_skip", SKIP), "holds the tensor W_skip") for name, write in READERS.items()},
    **{f"{name}, an output bias": (holding(write, "b_dec_out", BIAS), "holds the tensor b_dec_out") for name, write in READERS.items()},
    "a scale that is not folded in": (holding(saelens, "input_scale", torch.full((1,), 2.0)), "the tensor input_scale"),
    "thresholds of another kind": (holding(lambda root: saelens(root, "topk"), "threshold", torch.ones(F)), "the tensor threshold"),
    **{
        f"saelens, {name}": (lambda root, name=name: saelens(root, name), text)
        for name, text in {
            "transcoder": "holds a 'transcoder'",
            "skip_transcoder": "holds a 'skip_transcoder'",
            "jumprelu_transcoder": "holds a 'jumprelu_transcoder'",
            "crosscoder": "holds a 'crosscoder'",
            "temporal": "holds a 'temporal' SAE",
            "matryoshka_batchtopk": "holds a 'matryoshka_batchtopk' SAE",
        }.items()
    },
    **{
        f"saelens, {key} {value!r}": (lambda root, key=key, value=value: saelens(root, **{key: value}), text)
        for key, value, text in [
            ("hook_point_out", "blocks.4.hook_mlp_out", "is a transcoder from None to blocks.4.hook_mlp_out|is a transcoder from"),
            ("hook_name_out", "blocks.7.hook_mlp_out", "is a transcoder from"),
            ("d_out", D + 1, "is a transcoder from 6 to 7"),
            ("is_transcoder", True, "has is_transcoder set"),
            ("use_skip_connection", True, "has use_skip_connection set"),
            ("activation_fn", "tanh-relu", "names the activation 'tanh-relu' of a standard SAE"),
            ("activation_fn_str", "gelu", "names the activation 'gelu'"),
            ("activation", "batchtopk", "names the activation 'batchtopk'"),
            ("normalize_activations", "expected_average_only_in", "its scale is not in the files"),
            ("normalize_activations", True, "its scale is not in the files"),
            ("normalize_activations", "constant_norm_rescale", "normalises every token by itself"),
            ("activation_norm_scaling_factor", 2.5, "which is not in the weights"),
            ("estimated_norm_scaling_factor", "2.5", "which is not in the weights"),
            ("d_in", D + 1, "cfg.json gives d_in as 7, the weights have 6"),
            ("d_sae", 3, "cfg.json gives d_sae as 3, the weights have 20"),
            ("d_in", str(D), "'d_in' is '6': give a whole number"),
            ("apply_b_dec_to_input", "False", "'apply_b_dec_to_input' is 'False': give true or false"),
            ("apply_b_dec_to_input", 1, "'apply_b_dec_to_input' is 1: give true or false"),
            ("apply_b_dec_to_input", "no", "'apply_b_dec_to_input' is 'no': give true or false"),
            ("apply_b_dec", "False", "'apply_b_dec' is the text 'False': give true or false"),
            ("rescale_acts_by_decoder_norm", "true", "'rescale_acts_by_decoder_norm' is 'true'"),
            ("finetuning_scaling_factor", "false", "'finetuning_scaling_factor' is 'false'"),
            ("metadata", "text", "'metadata' is 'text': give an object"),
            ("architecture", ["standard"], "'architecture' is"),
            ("hook_layer", 5, "gives hook_layer as 5, and the place as blocks.7"),
            ("hook_name", "blocks.4.hook_resid_post", "give one text"),
        ]
    },
    "metadata, another layer out": (lambda root: saelens(root, **place(hook_layer=3, hook_layer_out=9)), "is a transcoder from 3 to 9"),
    "metadata, another place out": (lambda root: saelens(root, **place(hook_name_out="blocks.3.hook_mlp_out")), "hook_mlp_out"),
    "metadata, several layers": (lambda root: saelens(root, **place(hook_name=["blocks.3.hook_resid_post"])), "give a text"),
    "metadata, a flag": (lambda root: saelens(root, **place(prepend_bos="True")), "'prepend_bos' is the text 'True'"),
    **{
        f"gemma scope, {folder}": (gemma(folder), text)
        for folder, text in {
            "gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_50": "transcoder",
            "models--google--gemma-scope-9b-it-transcoders/snapshots/abc/layer_3/width_16k/average_l0_50": "no transcoders",
            "gemma-scope-2b-it-crosscoder/layer_3/width_16k/average_l0_50": "no transcoders",
            "transcoders/layer_3/width_16k/average_l0_50": "holds a transcoder",
        }.items()
    },
    "gemma scope 2, another type": (of(files.gemma_scope_2, type="crosscoder"), "holds a 'crosscoder'"),
    "gemma scope 2, affine": (of(files.gemma_scope_2, affine_skip_connection=True), "has affine_skip_connection set"),
    "gemma scope 2, width": (of(files.gemma_scope_2, width=7), "gives d_sae as 7, the weights have 20"),
    "llama scope, width": (of(files.llama_scope, d_model=12), "gives d_model as 12, the weights have 6"),
    "llama scope, a flag": (of(files.llama_scope, use_glu_encoder="False"), "'use_glu_encoder' is 'False'"),
    "llama scope r1, lorsa": (of(files.llama_scope_r1, sae_type="lorsa"), "holds a 'lorsa'"),
    "sparsify, transcode": (of(files.sparsify, transcode=True), "has transcode set"),
    "sparsify, latents": (of(files.sparsify, num_latents=21), "gives num_latents as 21, the weights have 20"),
    "sparsify, a flag": (of(files.sparsify, signed="false"), "'signed' is 'false'"),
    "dictionary_learning, size": (learned(trainer={"dict_size": 7}), "gives dict_size as 7, the weights have 20"),
    "dictionary_learning, both sides": (learned(buffer={"io": "in_and_out"}), "of the side 'in_and_out'"),
    "dictionary_learning, a transcoder": (learned(trainer={"dict_class": "SkipTranscoder"}), "SkipTranscoder"),
    "dictionary_learning, two layers": (learned(trainer={"layer": 3}), "gives layer as 3, and the module as 'resid_post_layer_11'"),
    "dictionary_learning, a layer from behind": (learned(trainer={"layer": -1, "submodule_name": None}), "gives layer as -1"),
    "dictionary_learning, no threshold yet": (holding(learned(), "threshold", torch.tensor(-1.0)), "before it is learned"),
    "saelens, no finetuned scale": (lambda root: saelens(root, finetuning_scaling_factor=True), "has none"),
    **{
        f"{name}, {number}": (holding(READERS[name], tensor, torch.full(shape, number)), "NaN or infinite")
        for number in (float("nan"), float("inf"))
        for name, tensor, shape in (("saelens", "W_dec", (F, D)), ("gemma scope", "b_dec", (D,)), ("qwen scope", "b_enc", (F,)))
    },
    "qwen scope, another repository": (qwen("SAE-MLP-Qwen3-1.7B-Base-W32K-L0_3"), r"\(SAE-Res\) are read"),
    "qwen scope, a transcoder": (qwen(model_type="transcoder"), "holds a 'transcoder'"),
    "qwen scope, width": (qwen(d_sae=7), "gives d_sae as 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line_with_the_file(name: str, tmp_path: Path) -> None:
    write, message = REFUSED[name]
    path = write(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_sae(path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


SHAPE = ModelShape(model_type="x", num_layers=30, num_experts=0, top_k=0, moe_layers=(), hidden_size=D, name="a/model")


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.3.hook_mlp_out",
        "blocks.3.attn.hook_z",
        "blocks.3.hook_resid_mid",
        "blocks.3.ln2.hook_normalized",
        "blocks.0.hook_resid_pre",
        "hook_embed",
        "model.layers.3.mlp",
        "blocks.3.hook_mlp_in",
        "ln_final.hook_normalized",
    ],
)
def test_another_site_is_no_residual_sae(hook: str, tmp_path: Path) -> None:
    sae = load_sae(saelens(tmp_path, **place(hook_name=hook)))
    with pytest.raises(ValueError, match="not the residual stream after a layer|belongs to layer"):
        check_fits(sae, SHAPE, 3)


def test_the_embedding_is_no_layer(tmp_path: Path) -> None:
    sae = load_sae(gemma("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6")(tmp_path))
    with pytest.raises(ValueError, match="reads hook_embed, not the residual stream"):
        check_fits(sae, SHAPE, 3)


ACCEPTED: dict[str, Write] = {
    **READERS,
    "an atom that never acts": holding(READERS["gemma scope"], "threshold", torch.full((F,), float("inf"))),
    "an atom whose bias never lets it act": holding(READERS["qwen scope"], "b_enc", torch.full((F,), -float("inf"))),
    "a threshold of 0, as a logarithm": holding(
        READERS["llama scope r1"], "log_jumprelu_threshold", torch.full((F,), -float("inf"))
    ),
    "the layer in a module's longer name": learned(
        trainer={"submodule_name": "resid_post_of_layer_1_and_layer_11", "layer": 11}
    ),
    "scaling_factor of ones": holding(saelens, "scaling_factor", torch.ones(F)),
    "an input scale of one": holding(saelens, "input_scale", torch.ones(1)),
    "the same place out": lambda root: saelens(
        root, **place(hook_name="blocks.7.hook_resid_post", hook_name_out="blocks.7.hook_resid_post")
    ),
    "no metadata": lambda root: saelens(root, metadata=None, hook_name="blocks.7.hook_resid_post", hook_layer=7),
    "relu by name": lambda root: saelens(root, activation_fn_str="relu", normalize_activations=False),
    "d_out as d_in": lambda root: saelens(root, d_out=D, is_transcoder=False, finetuning_scaling_factor=False),
    "gemma scope canonical": gemma("gemma-scope-2b-pt-res-canonical/layer_3/width_16k/canonical"),
    "a folder of any name": gemma("layer_3/width_16k/average_l0_50"),
    "gemma scope 27b": gemma("models--google--gemma-scope-27b-pt-res/snapshots/abc/layer_10/width_131k/average_l0_13"),
    "the output side": learned(buffer={"io": "out"}),
    "qwen's other fields": qwen(d_in=D, d_sae=F),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_its_neighbours_are_read(name: str, tmp_path: Path) -> None:
    sae = load_sae(ACCEPTED[name](tmp_path))
    assert sae.about.site in (None, "residual")
    check_fits(sae, SHAPE, 3 if sae.about.layer is None else sae.about.layer)


ODD: list[Any] = [None, "text", "", "true", -1, 0, 1e300, float(D), 10**30, [], ["a"], {}, {"a": 1}, True, False]
CONFIGURED = ["saelens", "gemma scope 2", "llama scope", "llama scope r1", "sparsify", "dictionary_learning"]


@pytest.mark.parametrize("name", CONFIGURED)
def test_any_value_in_a_configuration_is_read_or_refused(name: str, tmp_path: Path) -> None:
    """No other exception than ValueError in one line; and never other sizes than the weights have."""
    path = READERS[name](tmp_path)
    config_path = next(item for item in path.iterdir() if item.suffix == ".json")
    config = json.loads(config_path.read_text())
    keys = [(None, key) for key in config] + [
        (key, inner) for key, value in config.items() if isinstance(value, dict) for inner in value
    ]
    for outer, key in keys:
        for value in ["left out", *ODD]:
            changed = json.loads(json.dumps(config))
            place = changed if outer is None else changed[outer]
            if value == "left out":
                del place[key]
            else:
                place[key] = value
            config_path.write_text(json.dumps(changed))
            try:
                sae = load_sae(path)
            except ValueError as error:
                said = str(error)
            else:
                said = ""
                assert (sae.d_in, sae.width) == (D, F)
            assert "\n" not in said
            assert len(said) < 700


def test_sizes_and_counts_that_are_missing_are_named(tmp_path: Path) -> None:
    path = files.llama_scope(tmp_path).path
    config = json.loads((path / "hyperparams.json").read_text())
    del config["d_model"]
    (path / "hyperparams.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="gives d_model as None"):
        load_sae(path)
    path = learned(trainer={"dict_class": "AutoEncoderTopK", "k": None})(tmp_path)
    tensors = torch.load(path / "ae.pt")
    torch.save({name: value for name, value in tensors.items() if name not in ("k", "threshold")}, path / "ae.pt")
    with pytest.raises(ValueError, match="gives k as None"):
        load_sae(path)


def rewritten(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The same file of tensors with other content."""
    inside = (
        [path]
        if path.is_file()
        else [file for file in path.rglob("*") if file.suffix in (".safetensors", ".npz", ".pt")]
    )
    file = Path(inside[0]).resolve()
    if file.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)
    elif file.suffix == ".npz":
        tensors = change({name: torch.from_numpy(array) for name, array in np.load(file).items()})
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    else:
        content = torch.load(file)
        inner = content.get("state_dict", content)
        torch.save({"state_dict": change(inner)} if "state_dict" in content else change(inner), file)


DAMAGES: dict[str, tuple[Callable[[str, torch.Tensor], torch.Tensor | None], str]] = {
    "no decoder": (
        lambda name, tensor: None if "dec" in name.lower() and tensor.ndim == 2 else tensor,
        "has no tensor",
    ),
    "not numbers": (lambda _, tensor: tensor * float("nan") if tensor.ndim == 2 else tensor, "NaN or infinite in"),
    "whole numbers": (lambda _, tensor: tensor.int() if tensor.ndim == 2 else tensor, "as torch.int32"),
    "transposed": (lambda _, tensor: tensor.T if tensor.ndim == 2 else tensor, "check the format"),
    "another width": (lambda _, tensor: tensor[:-1] if tensor.ndim == 2 else tensor, "check the format"),
}


WRITERS = (
    *("saelens", "gemma_scope", "gemma_scope_2", "llama_scope", "llama_scope_r1", "qwen_scope"),
    *("dictionary_learning", "sparsify", "goodfire", "qresearch"),
)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", WRITERS)
def test_damaged_tensors_of_every_format_are_refused_by_their_file(name: str, damage: str, tmp_path: Path) -> None:
    path = getattr(files, name)(tmp_path).path
    change, said = DAMAGES[damage]
    load_sae(path)
    rewritten(
        path,
        lambda tensors: {
            key: new
            for key, tensor in tensors.items()
            if (new := change(key, tensor) if isinstance(tensor, torch.Tensor) else tensor) is not None
        },
    )
    with pytest.raises(ValueError, match=said) as caught:
        load_sae(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
