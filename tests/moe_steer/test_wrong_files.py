"""Files that a stranger hands over and that are wrong: from the command to one line that names the file, exit code 1, and nothing left."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import gguf_files
from bake_checkpoints import gains, qwen, read_shard, write_shard
from launch.cli.main import main
from moe_steer.backends.checkpoint import _not_finite
from moe_steer.backends.shard_index import check_shards
from moe_steer.baking.record import sealed
from moe_steer.baking.safetensors.folder import open_checkpoint
from moe_steer.lab import LAB_MODEL

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM = "model.norm.weight"
PROBLEM = {"problem_id": "a", "prompt": "What is 2 + 2?", "target": "4", "answer_type": "integer"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problems.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    return tmp_path


def in_two_shards(folder: Path) -> Path:
    """The embedded model as two shards with an index."""
    folder.mkdir()
    for path in LAB_MODEL.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    tensors = read_shard(LAB_MODEL / "model.safetensors")
    weight_map = {}
    for shard, names in ((FIRST, sorted(tensors)[::2]), (SECOND, sorted(tensors)[1::2])):
        write_shard(folder / shard, {name: tensors[name] for name in names})
        weight_map |= dict.fromkeys(names, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command says that refuses; it leaves no file behind."""
    before = set(Path.cwd().rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 1
    assert set(Path.cwd().rglob("*")) == before
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1
    return said


def generated(model: str) -> tuple[str, ...]:
    return (
        "generate",
        "--model",
        model,
        "--problems",
        "problems.jsonl",
        "--greedy",
        "--max-new-tokens",
        "2",
        "--out",
        "out",
    )


def index_omits(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][NORM]
    (folder / INDEX).write_text(json.dumps(index))


def held_twice(folder: Path) -> None:
    """The second shard holds a tensor of the first again: it is the one that would be read."""
    tensors = read_shard(folder / FIRST)
    dtype, shape, data = tensors["lm_head.weight"]
    write_shard(folder / SECOND, {**read_shard(folder / SECOND), "lm_head.weight": (dtype, shape, bytes(len(data)))})


def not_a_number(folder: Path) -> None:
    tensors = read_shard(folder / FIRST)
    name = next(name for name in tensors if name.endswith("experts.5.down_proj.weight") and ".2." in name)
    dtype, shape, data = tensors[name]
    write_shard(folder / FIRST, {**tensors, name: (dtype, shape, b"\xff" * 4 + data[4:])})


@pytest.mark.parametrize(
    ("damage", "loaded", "baked"),
    [
        (index_omits, f"the index does not list its tensor {NORM}", f"the index does not list its tensor {NORM}"),
        (
            held_twice,
            f"the weight file {SECOND} in 'model' is damaged (it holds lm_head.weight again, which the index takes from {FIRST})",
            f"{SECOND} is not what {INDEX} says (it holds lm_head.weight again, which the index takes from {FIRST})",
        ),
        (
            not_a_number,
            "tensor 'model.layers.2.mlp.experts.down_proj' holds numbers that are NaN or infinite: fetch it again",
            "model.layers.2.mlp.experts.5.down_proj.weight holds 1 numbers that are NaN or infinite: fetch the checkpoint again",
        ),
    ],
)
def test_a_checkpoint_that_contradicts_itself_is_neither_run_nor_baked(
    here: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], loaded: str, baked: str
) -> None:
    damage(in_two_shards(here / "model"))
    gains((2, 5, 2.0)).save("plan.json")
    assert loaded in refusal(capsys, *generated("model"))
    assert baked in refusal(capsys, "bake", "--model", "model", "--plan", "plan.json", "--out", "out")


def test_a_constant_that_nobody_reads_may_be_missing_in_the_index(here: Path) -> None:
    """Older libraries stored the frequencies of the rotary embedding in every layer."""
    in_two_shards(here / "model")
    tensors = read_shard(here / "model" / FIRST)
    stored = {**tensors, "model.layers.2.self_attn.rotary_emb.inv_freq": ("F32", [8], bytes(32))}
    write_shard(here / "model" / FIRST, stored)
    gains((2, 5, 2.0)).save("plan.json")
    assert main(["bake", "--model", "model", "--plan", "plan.json", "--out", "baked"]) == 0
    assert set(read_shard(here / "baked" / FIRST)) == set(stored)
    assert main(["verify", "--baked", "baked", "--model", "model"]) == 0
    assert main(generated("model")) == 0
    assert main((*generated("baked")[:-1], "out-baked")) == 0


def test_what_no_order_of_reading_changes_is_no_contradiction(here: Path) -> None:
    """The same bytes twice, constants twice, masks of whole numbers that no index lists."""
    in_two_shards(here / "model")
    first, second = (read_shard(here / "model" / name) for name in (FIRST, SECOND))
    frequencies = ("F32", [8], bytes(32))
    first |= {"rotary_emb.inv_freq": frequencies}
    second |= {
        "lm_head.weight": first["lm_head.weight"],
        "rotary_emb.inv_freq": ("F32", [8], b"\x01" * 32),
        "model.layers.0.attention.bias": ("BOOL", [8], bytes(8)),
    }
    write_shard(here / "model" / FIRST, first)
    write_shard(here / "model" / SECOND, second)
    index = json.loads((here / "model" / INDEX).read_text())
    index["weight_map"]["rotary_emb.inv_freq"] = FIRST
    (here / "model" / INDEX).write_text(json.dumps(index))
    check_shards(here / "model")
    assert "lm_head.weight" in open_checkpoint(here / "model").repeated


def test_weights_of_other_packages_and_of_few_bits_are_not_read_as_numbers() -> None:
    """torchao's classes know no minimum; bitsandbytes packs bits into numbers; float16 makes infinities of what it cannot hold."""

    class Packed(nn.Parameter):
        pass

    model = nn.Module()
    packed = torch.full((4,), math.nan)
    model.weight = Packed(packed, requires_grad=False)
    assert _not_finite(model) == ""
    model.weight = nn.Parameter(torch.tensor([-1e30, 1.0]).half())
    assert _not_finite(model) == ""
    model.weight = nn.Parameter(torch.tensor([math.nan, 1.0]).half())
    assert "NaN or infinite" in _not_finite(model)
    model.weight = nn.Parameter(torch.tensor([-math.inf, 1.0]))
    assert "NaN or infinite" in _not_finite(model)


def test_an_overlay_is_held_twice_and_read(here: Path) -> None:
    """The other side of the refusal: an overlay's tensors come last, and the index names them."""
    in_two_shards(here / "model")
    gains((2, 5, 2.0)).save("plan.json")
    overlay = ("--overlay", "--loader", "by-index")
    assert main(["bake", "--model", "model", "--plan", "plan.json", "--out", "baked", *overlay]) == 0
    assert main(generated("baked")) == 0


def baked_and_resealed(here: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A baked folder whose record was changed, and has the hash of what it says now."""
    qwen(here / "model")
    gains((0, 1, 2.0)).save("plan.json")
    assert main(["bake", "--model", "model", "--plan", "plan.json", "--out", "baked", "--copy"]) == 0
    record = here / "baked" / "steering.json"
    body = {key: value for key, value in json.loads(record.read_text()).items() if key != "sha256"}
    change(body)
    record.write_text(sealed(body, 1))


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], object]:
    """Of the first edit of the first changed tensor."""
    return lambda body: change(body["changes"][0]["edits"][0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda body: body.pop("plan"), "'plan'"),
        (lambda body: body.update(changes="all"), "'changes' is 'all': give a list"),
        (lambda body: body.update(files=[]), "'files' is []: give an object"),
        (lambda body: body.update(source=None), "'source' is None: give an object"),
        (lambda body: body.update(patches={"config.json": [1]}), "'patch' is 1: give a list"),
        (lambda body: body["certificate"].update(new=1), "certificate: unknown key 'new'"),
        (lambda body: body["certificate"].pop("verdict"), "certificate: 'verdict' is missing"),
        (lambda body: body["certificate"]["entries"][0].update(gain="2"), "entries: 'gain' is '2': give a number"),
        (lambda body: body["files"]["config.json"].update(size="1"), "config.json: 'size' is '1'"),
        (lambda body: body["files"].pop("model.safetensors"), "'model.safetensors' is changed and not among its files"),
        (edited(lambda edit: edit.update(begin="x")), "edits: 'begin' is 'x'"),
        (edited(lambda edit: edit.update(begin=-8)), "edits: bytes -8 to"),
        (edited(lambda edit: edit.update(factor="2")), "edits: 'factor' is '2'"),
        (edited(lambda edit: edit.update(operation="add")), "edits: 'operation' is 'add': give one of 'multiply'"),
        (edited(lambda edit: edit.update(end=1 << 60)), "bytes, and its record says more"),
    ],
)
def test_a_record_whose_hash_fits_and_whose_content_does_not(
    here: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], object], said: str
) -> None:
    baked_and_resealed(here, change)
    assert said in refusal(capsys, "verify", "--baked", "baked")
    assert said in refusal(capsys, "unbake", "--baked", "baked", "--out", "back")


@pytest.mark.parametrize("name", ["../outside.json", "/tmp/outside.json"])
def test_a_record_names_no_file_outside_of_its_folder(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A baked folder comes from anywhere: taking it back writes where it says, and must not write there."""
    baked_and_resealed(here, lambda body: body["files"]["config.json"].update(source=name))
    for command in (["verify", "--baked", "baked"], ["unbake", "--baked", "baked", "--out", "back"]):
        assert f"it names '{name}', which is outside of the folder" in refusal(capsys, *command)


def test_a_gguf_record_with_a_value_of_another_type(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf_files.write_gguf(here / "model.gguf")
    gains((2, 1, 2.0)).save("plan.json")
    assert main(["bake", "--model", "model.gguf", "--plan", "plan.json", "--out", "baked.gguf"]) == 0
    record = here / "baked.gguf.steering.json"
    body = {key: value for key, value in json.loads(record.read_text()).items() if key != "sha256"}
    body["slices"][0]["max_relative_error"] = "0"
    record.write_text(sealed(body, 2))
    assert "slices: 'max_relative_error' is '0': give a number" in refusal(capsys, "verify", "--baked", "baked.gguf")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            {"gain": 1e39},
            "gain of layer 2 expert 5 is 1e+39, beyond float32, in which models compute: give at most 3.4e+38",
        ),
        ({"gain": "2"}, "gain of layer 2 expert 5 is '2': give a finite number >= 0"),
        ({"gain": -1}, "gain of layer 2 expert 5 is -1: give a finite number >= 0"),
        ({"gain": 1.0, "logit_bias": -1e39}, "logit_bias of layer 2 expert 5 is -1e+39, beyond float32"),
        ({"gain": 2.0, "expert": 16}, "the plan names expert 16 of a model with 16 experts: correct one of them"),
        ({"gain": 2.0, "layer": 4}, "the plan names layer 4 of a model with 4 layers: correct one of them"),
    ],
)
def test_a_plan_is_refused_before_anything_begins(
    here: Path, capsys: pytest.CaptureFixture[str], entry: dict[str, Any], said: str
) -> None:
    model = {"model_type": "deepseek_v3", "num_layers": 4, "num_experts": 16, "name": "lab"}
    plan = {"version": 1, "model": model, "experts": [{"layer": 2, "expert": 5, **entry}]}
    (here / "plan.json").write_text(json.dumps(plan))
    assert said in refusal(capsys, *generated("lab"), "--plan", "plan.json")
    assert said in refusal(capsys, "bake", "--model", "lab", "--plan", "plan.json", "--out", "out")
    assert said in refusal(capsys, "plan", "--start", "plan.json", "--out", "other.json")


def test_more_experts_a_token_than_there_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"model_type": "deepseek_v3", "num_layers": 4, "num_experts": 16}
    plan: dict[str, Any] = {"version": 1, "model": model, "top_k": [{"layer": 2, "k": 16}]}
    (here / "plan.json").write_text(json.dumps(plan))
    assert main(["plan", "--start", "plan.json", "--out", "all.json"]) == 0
    plan["top_k"][0]["k"] = 17
    (here / "plan.json").write_text(json.dumps(plan))
    said = refusal(capsys, "plan", "--start", "plan.json", "--out", "other.json")
    assert "the plan names k 17 of a model with 16 experts" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: tensor * float("nan"), "holds numbers that are NaN or infinite in W_dec: download it again"),
        (lambda tensor: tensor.long(), "holds W_dec as torch.int64: numbers with a point are expected"),
    ],
)
def test_an_sae_that_is_no_table_of_finite_numbers(
    here: Path, capsys: pytest.CaptureFixture[str], change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    """Refused by its file alone, before the model is loaded."""
    shutil.copytree(LAB_MODEL.parent / "dense_sae", here / "sae")
    weights = here / "sae" / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "W_dec": change(tensors["W_dec"]).contiguous()}, weights)
    (here / "texts.txt").write_text("What is 2 + 2?\n")
    said_here = refusal(capsys, "sae-fit", "--model", "lab-dense", "--texts", "texts.txt", "--sae", "sae")
    assert f"sae/sae_weights.safetensors {said}" in said_here
