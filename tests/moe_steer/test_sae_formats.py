"""Every published format, against files written and encoded by independent code."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae_files as files
from moe_steer.saes import SAE, load_sae, save_sae
from moe_steer.saes.reading import FORMATS
from moe_steer.saes.weights import read_npz


def tokens(num: int = 40) -> files.Array:
    return np.random.default_rng(99).normal(size=(num, files.D)) * 1.5


def differences(sae: SAE, naive: files.Naive, x: files.Array) -> tuple[float, float]:
    """Largest difference of activations and of reconstructions, in float64."""
    wide = sae.to(dtype=torch.float64)
    acts = wide.encode(torch.tensor(x))
    out = wide.decode(acts)
    expected = [naive(row) for row in x]
    return (
        float(np.abs(acts.numpy() - np.array([item[0] for item in expected])).max()),
        float(np.abs(out.numpy() - np.array([item[1] for item in expected])).max()),
    )


CASES: dict[str, tuple[Callable[[Path], files.Published], str, str, Any, Any, str | None]] = {
    # name: (writer, format, kind, layer, site, model)
    "saelens jumprelu": (files.saelens, "saelens", "jumprelu", 7, "residual", "google/gemma-2-2b"),
    "saelens standard": (
        lambda root: files.saelens(root, "standard"),
        "saelens",
        "relu",
        7,
        "residual",
        "google/gemma-2-2b",
    ),
    "saelens topk": (lambda root: files.saelens(root, "topk"), "saelens", "topk", 7, "residual", "google/gemma-2-2b"),
    "saelens topk by norm": (
        lambda root: files.saelens(root, "topk", rescale_acts_by_decoder_norm=True),
        "saelens",
        "topk",
        7,
        "residual",
        "google/gemma-2-2b",
    ),
    "saelens gated": (
        lambda root: files.saelens(root, "gated"),
        "saelens",
        "gated",
        7,
        "residual",
        "google/gemma-2-2b",
    ),
    "saelens plain input": (
        lambda root: files.saelens(root, "jumprelu", apply_b_dec_to_input=False),
        "saelens",
        "jumprelu",
        7,
        "residual",
        "google/gemma-2-2b",
    ),
    "saelens before 6": (files.saelens_3, "saelens", "topk", 2, "residual", "gpt2-small"),
    "gemma scope": (files.gemma_scope, "gemma-scope", "jumprelu", 20, "residual", "google/gemma-2-9b-it"),
    "gemma scope mlp": (
        lambda root: files.gemma_scope(root, "gemma-scope-2b-pt-mlp"),
        "gemma-scope",
        "jumprelu",
        20,
        "mlp_out",
        "google/gemma-2-2b",
    ),
    "gemma scope heads": (
        lambda root: files.gemma_scope(root, "gemma-scope-9b-pt-att"),
        "gemma-scope",
        "jumprelu",
        20,
        "blocks.20.attn.hook_z",
        "google/gemma-2-9b",
    ),
    "gemma scope 2": (files.gemma_scope_2, "gemma-scope-2", "jumprelu", 12, "residual", "google/gemma-3-1b-it"),
    "llama scope": (files.llama_scope, "llama-scope", "jumprelu", 15, "residual", "meta-llama/Llama-3.1-8B"),
    "llama scope without norms": (
        lambda root: files.llama_scope(root, sparsity_include_decoder_norm=False),
        "llama-scope",
        "jumprelu",
        15,
        "residual",
        "meta-llama/Llama-3.1-8B",
    ),
    "llama scope r1": (
        files.llama_scope_r1,
        "llama-scope-r1",
        "jumprelu",
        20,
        "residual",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    ),
    "qwen scope": (files.qwen_scope, "qwen-scope", "topk", 5, "residual", "Qwen/Qwen3-1.7B-Base"),
    "dictionary_learning": (
        files.dictionary_learning,
        "dictionary-learning",
        "jumprelu",
        11,
        "residual",
        "Qwen/Qwen2.5-7B-Instruct",
    ),
    **{
        f"dictionary_learning {name}": (
            lambda root, name=name: files.dictionary_learning(root, name),
            "dictionary-learning",
            kind,
            11,
            "residual",
            "Qwen/Qwen2.5-7B-Instruct",
        )
        for name, kind in {
            "MatryoshkaBatchTopKSAE": "jumprelu",
            "AutoEncoderTopK": "topk",
            "AutoEncoder": "relu",
        }.items()
    },
    "sparsify": (files.sparsify, "sparsify", "topk", 10, "residual", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"),
    "sparsify mlp": (
        lambda root: files.sparsify(root, "layers.10.mlp"),
        "sparsify",
        "topk",
        10,
        "mlp_out",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    ),
    "goodfire": (files.goodfire, "linear-pair", "relu", 19, "residual", None),
    "qresearch": (files.qresearch, "linear-pair", "relu", 19, "residual", None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_published_file_encodes_and_decodes_as_its_publisher_does(name: str, tmp_path: Path) -> None:
    write, format, kind, layer, site, model_name = CASES[name]
    published = write(tmp_path)
    sae = load_sae(published.path)
    assert (sae.about.format, sae.kind) == (format, kind)
    assert (sae.about.layer, sae.about.site, sae.about.model_name) == (layer, site, model_name)
    assert (sae.d_in, sae.width, len(sae.about.sha256)) == (files.D, files.F, 64)
    x = tokens()
    acts, out = differences(sae, published.naive, x)
    assert acts < 2e-5
    assert out < 2e-5
    assert 0 < float((sae.encode(torch.tensor(x)) > 0).float().mean()) < 1
    named = load_sae(published.path, format=format)
    assert all(torch.equal(value, named.tensors()[field]) for field, value in sae.tensors().items())


@pytest.mark.parametrize("name", CASES)
def test_written_as_saelens_and_read_back_every_number_is_the_same(name: str, tmp_path: Path) -> None:
    sae = load_sae(CASES[name][0](tmp_path).path)
    again = load_sae(save_sae(sae, tmp_path / "out"))
    assert sae.tensors().keys() == again.tensors().keys()
    assert all(torch.equal(value, again.tensors()[field]) for field, value in sae.tensors().items())
    assert (again.kind, again.k, again.apply_b_dec_to_input) == (sae.kind, sae.k, sae.apply_b_dec_to_input)
    assert (again.about.layer, again.about.site) == (sae.about.layer, sae.about.site)
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["cfg.json", "sae_weights.safetensors"]


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    published = files.llama_scope(tmp_path)
    config = json.loads((published.path / "hyperparams.json").read_text())
    config["dataset_average_activation_norm"] = {"in": 0.81, "out": 0.81}
    (published.path / "hyperparams.json").write_text(json.dumps(config))
    assert min(differences(load_sae(published.path), published.naive, tokens())) > 1e-3


def test_a_file_of_the_folder_may_be_named(tmp_path: Path) -> None:
    for write, file in (
        (files.saelens, "sae_weights.safetensors"),
        (files.gemma_scope, "params.npz"),
        (files.dictionary_learning, "ae.pt"),
    ):
        published = write(tmp_path / file)
        assert load_sae(published.path / file).about.format == load_sae(published.path).about.format


def test_k_comes_from_the_configuration_the_name_or_the_caller(tmp_path: Path) -> None:
    published = files.qwen_scope(tmp_path, config=True)
    assert load_sae(published.path).k == files.K
    plain = tmp_path / "renamed" / "layer5.sae.pt"
    plain.parent.mkdir()
    shutil.copy(published.path, plain)
    with pytest.raises(
        ValueError, match="the k of .*layer5.sae.pt is not known: put the repository's config.json beside it"
    ):
        load_sae(plain)
    assert load_sae(plain, k=4).k == 4
    topk = files.goodfire(tmp_path, k=5)
    sae = load_sae(topk.path, k=5, layer=19, site="residual", model_name="deepseek-ai/DeepSeek-R1")
    assert (sae.kind, sae.about.model_name) == ("topk", "deepseek-ai/DeepSeek-R1")
    assert max(differences(sae, topk.naive, tokens())) < 2e-5


def test_a_folder_of_many_layers_needs_one(tmp_path: Path) -> None:
    folder = files.qwen_scope(tmp_path, (3, 14)).path.parent
    assert load_sae(folder, layer=14).about.layer == 14
    with pytest.raises(ValueError, match="holds the SAEs of 2 layers: say which layer"):
        load_sae(folder)
    with pytest.raises(ValueError, match=r"has no layer4.sae.pt: it has layer14.sae.pt, layer3.sae.pt"):
        load_sae(folder, layer=4)


def test_what_is_said_must_not_contradict_the_files(tmp_path: Path) -> None:
    path = files.saelens(tmp_path).path
    with pytest.raises(ValueError, match="says that it belongs to layer 7, not 8"):
        load_sae(path, layer=8)
    with pytest.raises(ValueError, match="says that it reads residual, not mlp_out"):
        load_sae(path, site="mlp_out")
    assert load_sae(path, layer=7, site="residual", model_name="mine").about.model_name == "mine"


def test_thresholds_without_an_architecture_are_not_read_as_relu(tmp_path: Path) -> None:
    path = files.saelens(tmp_path, "jumprelu").path
    config = json.loads((path / "cfg.json").read_text())
    assert load_sae(path).kind == "jumprelu"
    del config["architecture"]
    (path / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match='holds thresholds, and cfg.json says .no architecture.: set "architecture"'):
        load_sae(path)


REFUSED: dict[str, tuple[Callable[[Path], files.Published], str]] = {
    "another architecture": (lambda root: files.saelens(root, "temporal"), "holds a 'temporal' SAE: standard"),
    "a training checkpoint": (lambda root: files.saelens(root, "batchtopk"), "export a training checkpoint"),
    "an unfolded scale": (
        lambda root: files.saelens(root, normalize_activations="expected_average_only_in"),
        "its scale is not in the files",
    ),
    "a norm of each token": (
        lambda root: files.saelens(root, normalize_activations="layer_norm"),
        r"normalises every token by itself \(layer_norm\)",
    ),
    "a transcoder": (
        lambda root: files.gemma_scope_2(root, hf_hook_point_out="model.layers.12.mlp.output"),
        "is a transcoder from model.layers.12.output",
    ),
    "an affine transcoder": (lambda root: files.gemma_scope_2(root, affine_connection=True), "is a transcoder"),
    "a llama transcoder": (
        lambda root: files.llama_scope(root, hook_point_out="blocks.15.hook_mlp_out"),
        "is a transcoder from blocks.15.hook_resid_post to blocks.15.hook_mlp_out",
    ),
    "a top-k llama scope": (lambda root: files.llama_scope(root, act_fn="topk"), "jumprelu is expected"),
    "a norm of each token in llama scope": (
        lambda root: files.llama_scope(root, norm_activation="token-wise"),
        "normalises activations 'token-wise'",
    ),
    "no mean norm": (
        lambda root: files.llama_scope_r1(
            root, hook_point_in="blocks.21.hook_resid_post", hook_point_out="blocks.21.hook_resid_post"
        ),
        "gives the mean activation norm as None",
    ),
    "another dictionary": (lambda root: files.dictionary_learning(root, "CrossCoder"), "holds a 'CrossCoder'"),
    "a skip transcoder": (lambda root: files.sparsify(root, skip_connection=True), "has skip_connection set"),
    "another activation": (lambda root: files.sparsify(root, activation="groupmax"), "has the activation 'groupmax'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    write, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as caught:
        load_sae(write(tmp_path).path)
    assert "\n" not in str(caught.value)


def test_wrong_paths_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no SAE at"):
        load_sae(tmp_path / "none")
    with pytest.raises(ValueError, match="SAE format 'sae' is unknown: choose auto, saelens"):
        load_sae(tmp_path, format="sae")
    with pytest.raises(ValueError, match=r"is not an SAE of a known format \(found: nothing\)"):
        load_sae(tmp_path)
    with pytest.raises(ValueError, match="params.npz cannot be read"):
        load_sae(tmp_path, format="gemma-scope")
    path = files.saelens(tmp_path).path / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="is damaged"):
        load_sae(path.parent)
    (path.parent / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match="cfg.json is not JSON"):
        load_sae(path.parent)


def test_a_gemma_scope_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    np.savez(path, W_enc=np.zeros((40, 80), dtype=np.float32))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="params.npz cannot be read as npz: File is not a zip file"):
        read_npz(path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = files.saelens(tmp_path).path / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if name != "threshold"}, path)
    with pytest.raises(ValueError, match="has no tensor threshold, it has W_dec, W_enc, b_dec, b_enc"):
        load_sae(path.parent)


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("raise SystemExit('the pickle was run')",))


def test_no_pickle_is_run(tmp_path: Path) -> None:
    path = tmp_path / "layer3.sae.pt"
    for write in (lambda: path.write_bytes(pickle.dumps(Bomb())), lambda: torch.save({"W_enc": Bomb()}, path)):
        write()
        with pytest.raises(ValueError, match="other pickles are not opened"):
            load_sae(path, k=3)


def test_every_format_has_a_case() -> None:
    assert {case[1] for case in CASES.values()} == set(FORMATS)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_sae_lens_reads_the_same_in_what_we_write(architecture: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sae_lens")
    sae = load_sae(files.saelens(tmp_path, architecture).path)
    theirs = library.SAE.load_from_disk(save_sae(sae, tmp_path / "ours"))
    x = torch.tensor(tokens(), dtype=torch.float32)
    with torch.no_grad():
        assert torch.allclose(theirs.encode(x), sae.encode(x), atol=1e-5)
        assert torch.allclose(theirs.decode(theirs.encode(x)), sae.decode(sae.encode(x)), atol=1e-5)
