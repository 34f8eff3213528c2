"""One process, layers in memory and on disk: the same numbers as in the plain model, to the bit, and the refusals."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from expert_stats.collect import router_digest
from launch.cli.main import main
from moe_steer import ExpertGain, ResidualVector, SteeringPlan, load_model, observe_residual, observe_routing, steer
from moe_steer.backends import layout_of
from moe_steer.backends.blueprint import skeleton
from moe_steer.backends.device_map import check_max_memory, place
from moe_steer.backends.memory import choose_backend, plan_memory
from moe_steer.directions import Direction
from moe_steer.layers import moe_layers
from reasoning_evals.engines import InProcessSampler, Request, SamplingConfig

pytestmark = pytest.mark.slow

ROOM = "cpu=3MiB"
"""Of the lab model's 7 MiB and four layers; two and the head rest on disk."""


class Both(NamedTuple):
    plain: Any
    spread: Any
    tokenizer: Any
    folder: Path


class AlignedProducts(TorchDispatchMode):
    """Products of copies, which begin at addresses that are multiples of 64 bytes.

    A product of few rows takes another kernel when a weight begins elsewhere (seen with AVX2 alone), and its last bits move. Where
    a weight begins is the file's affair: 48 bytes past such an address in one mapped file, 56 in another. With copies, what is left
    to differ is what the backend does.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__.endswith("mm"):
            args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def aligned() -> Iterator[None]:
    with AlignedProducts():
        yield


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """The lab model, whole and with layers on disk."""
    folder = tmp_path_factory.mktemp("disk")
    plain, tokenizer = load_model("lab", "plain")
    spread, _ = load_model("lab", "device_map", offload=str(folder), max_memory=ROOM)
    return Both(plain, spread, tokenizer, folder)


@pytest.fixture(scope="module")
def plan(both: Both, tmp_path_factory: pytest.TempPathFactory) -> SteeringPlan:
    """Gains in all layers with experts, and a vector in the thought at a layer on disk."""
    width = both.plain.config.hidden_size
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("direction") / "direction.safetensors"
    Direction(vector_D=torch.randn(width, generator=generator), layer=2, site="residual", method="caa").save(path)
    gains = [ExpertGain(layer.index, expert, 8.0) for layer in moe_layers(both.plain) for expert in range(0, 8, 3)]
    return SteeringPlan(experts=gains, residual=[ResidualVector(2, str(path), 0.5, scope="thought")], scope="thought")


def ids_of(both: Both) -> Tensor:
    text = both.tokenizer.decode(both.tokenizer("12+34=")["input_ids"]) + "<think>so 46.\n</think>46"
    return both.tokenizer(text, return_tensors="pt")["input_ids"]


def test_layers_rest_on_disk_between_calls(both: Both) -> None:
    places = set(both.spread.hf_device_map.values())
    assert places == {"cpu", "disk"}
    resting = [name for name, parameter in both.spread.named_parameters() if parameter.is_meta]
    assert {"model.layers.3.mlp.experts.down_proj", "model.layers.2.self_attn.kv_b_proj.weight"} <= set(resting)
    assert both.spread.device.type == "cpu"
    assert layout_of(both.spread).backend == "device_map"
    assert [path.name.startswith("weights-") for path in both.folder.iterdir()] == [True]


def test_logits_are_the_plain_models_steered_and_not(both: Both, plan: SteeringPlan) -> None:
    ids_BS, seen = ids_of(both), []
    for model in (both.plain, both.spread):
        with torch.no_grad():
            with steer(model, plan, tokenizer=both.tokenizer, strict=True) as audit:
                steered = model(ids_BS).logits
            seen.append((model(ids_BS).logits, steered, audit.to_rows()))
    (plain, plain_steered, plain_rows), (spread, spread_steered, spread_rows) = seen
    assert torch.equal(plain, spread)
    assert torch.equal(plain_steered, spread_steered)
    assert not torch.equal(plain, plain_steered)
    assert plain_rows == spread_rows


def observed(model: Any, ids_BS: Tensor) -> dict[Any, list[Tensor]]:
    """Routing by layer, and two residual streams; the forward ends after the second, inside accelerate's hooks."""
    found: dict[Any, list[Tensor]] = {}
    with torch.no_grad(), observe_routing(model, lambda layer, ids, weights: found.update({layer: [ids, weights]})):
        with observe_residual(model, [1, 2], lambda layer, hidden: found.update({f"x{layer}": [hidden]}), stop=True):
            model(ids_BS)
    return found


def test_observed_routing_and_residual_streams_are_the_plain_models(both: Both) -> None:
    plain, spread = (observed(model, ids_of(both)) for model in (both.plain, both.spread))
    assert plain.keys() == spread.keys() >= {1, "x2"}
    assert all(torch.equal(a, b) for key in plain for a, b in zip(plain[key], spread[key], strict=True))
    assert router_digest(both.plain) == router_digest(both.spread) != ""


@pytest.mark.parametrize("greedy", [True, False])
def test_sampled_tokens_are_the_plain_models(both: Both, plan: SteeringPlan, greedy: bool) -> None:
    """Rows of unequal length that end at different steps; the lab model decodes in its latents, whose weights rest on disk."""
    config = SamplingConfig(max_new_tokens=24, greedy=greedy, batch_size=6)
    found: list[Any] = []
    for model in (both.plain, both.spread):
        sampler = InProcessSampler(model, both.tokenizer)
        prompts = [sampler.render(text) for text in ("3+4", "what is 12 * 3?", "5-1")]
        requests = [
            Request(tuple(prompt.token_ids), seed, (number, seed))
            for number, prompt in enumerate(prompts)
            for seed in range(2)
        ]
        with steer(model, plan, tokenizer=both.tokenizer, quiet=True):
            steered = list(sampler.sample(requests, config))
        found.append((list(sampler.sample(requests, config)), steered))
    assert found[0] == found[1]


@pytest.mark.parametrize("make", [tiny.qwen3_moe, tiny.qwen2])
def test_other_families(make: Any, tmp_path: Path) -> None:
    """Experts that the library converts are written to the folder; a dense model is read from its checkpoint."""
    from tiny_reasoners import tiny_tokenizer

    (model := make()).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (disk := tmp_path / "disk").mkdir()
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    spread, _ = load_model(
        tmp_path / "model", "device_map", offload=str(disk), max_memory=f"cpu={held * 2 // 3 // 1024}KiB"
    )
    assert sum(parameter.is_meta for parameter in spread.parameters()) > 4
    ids_BS = torch.arange(3, 13)[None]
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model(ids_BS).logits, spread(ids_BS).logits)
    assert torch.equal(model.generate(ids_BS, **asked), spread.generate(ids_BS, **asked))
    del spread
    gc.collect()
    assert not list(disk.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": "cpu=3MiB"}, "of .* GiB of weights find no room: use offload 'cpu' or a folder"),
        ({"max_memory": "cpu=1KiB", "offload": "."}, "has no room on the first device .cpu, .*more in max_memory"),
        ({"max_memory": "0=1GiB,cpu=3MiB"}, "names GPU 0, this machine has 0 GPUs"),
        ({"max_memory": "cpu=much"}, "'cpu=much' is not understood at 'cpu=much': name each GPU"),
        ({"max_memory": "cpu=1GiB,cpu=1GiB"}, "is not understood at 'cpu=1GiB'"),
        ({"max_memory": "disk=1GiB"}, "is not understood at 'disk=1GiB'"),
        ({"max_memory": ROOM, "offload": "/no/such"}, "offload names no folder: '/no/such'"),
        ({"max_memory": ROOM, "backend": "plain"}, "max_memory .* is a feature of device_map, not of plain"),
    ],
)
def test_what_cannot_be_done_is_one_line(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_model("lab", **{"backend": "device_map", **options})
    assert "\n" not in str(caught.value)


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process spreads the layers over all GPUs: start it without deepspeed"):
        load_model("lab", "device_map")


def lab_config() -> Any:
    from moe_steer.backends import read_config

    return read_config("lab")


def test_gpus_of_unequal_size_then_memory_then_disk() -> None:
    """GPUs are filled in order, each with room for its part of the cache; what is left goes on."""
    model = skeleton(lab_config())
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    whole = place(model, [size // 2, size], 0, False)
    assert set(whole.held) == {0, 1}
    assert whole.largest == 0
    assert sum(whole.held.values()) >= size
    with pytest.raises(ValueError, match="find no room"):
        place(model, [size // 2, size], 0, False, cache=2 * size)
    rest = place(model, [size // 2, size // 8], size, True)
    assert set(rest.held) >= {0, "cpu"}
    assert rest.largest > 0
    assert rest.modules["model.embed_tokens"] == 0
    asked = place(model, [], None, True, asked=f"0={size // 2048}KiB,cpu=0GiB")
    assert set(asked.held) == {0, "disk"}


def test_auto_takes_it_after_plain_and_before_offloading_everything() -> None:
    config = lab_config()
    plain = plan_memory(config, 1, 2**30, context=64).footprints[0]
    near = plain.total * 8 // 10
    two = plan_memory(config, 1, near, context=64, gpus=(near, near))
    assert two.fastest is not None
    assert two.fastest.backend == "device_map"
    assert choose_backend(config, 1, "auto", "", plain.total * 2, True, context=64)[0] == "plain"
    backend, reason = choose_backend(config, 1, "auto", "", near, True, context=64)
    assert backend == "device_map"
    assert "GPU 0: " in reason
    assert "cpu: " in reason
    assert choose_backend(config, 1, "auto", "cpu", near, True, context=64)[0] == "device_map"
    assert choose_backend(config, 2, "auto", "cpu", near, True, context=64)[0] == "zero3"


def test_auto_spreads_a_model_over_memory_and_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_model("lab", offload=str(tmp_path), max_memory=ROOM)
    assert "backend device_map: the fastest that fits, weights on cpu: " in capsys.readouterr().err


def test_the_memory_command_shows_its_devices(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["memory", "--model", "lab", "--gpus", "2", "--gpu-gib", "0.0075", "--context", "64"]
    assert main([*asked, "--backend", "device_map"]) == 0
    shown = capsys.readouterr().out
    assert "tp_ep" not in shown
    assert "fits (GPU 0: " in shown
    assert ", GPU 1: " in shown
    assert main([*asked, "--max-memory", "0=1MiB", "--backend", "device_map"]) == 1
    assert main([*asked, "--max-memory", "0=1MiB,1=1GiB", "--backend", "tp_ep"]) == 1
    assert "max_memory is a feature of device_map" in capsys.readouterr().out


def test_sizes_are_read_by_the_library() -> None:
    assert check_max_memory("0=20GiB, 1=500MB,cpu=1KiB") == {0: 20 * 2**30, 1: 500 * 10**6, "cpu": 1024}


def test_generate_takes_the_backend(tmp_path: Path) -> None:
    """The same answers in the same run, whichever way the model is held."""
    (disk := tmp_path / "disk").mkdir()
    asked = ["generate", "--num", "2", "--max-new-tokens", "24", "--greedy"]
    spread = ["--backend", "device_map", "--offload", str(disk), "--max-memory", ROOM]
    assert main([*asked, "--out", str(tmp_path / "plain")]) == 0
    assert main([*asked, "--out", str(tmp_path / "spread"), *spread]) == 0
    lines = [
        [json.loads(line) for line in (tmp_path / name / "generations.jsonl").read_text().splitlines()]
        for name in ("plain", "spread")
    ]
    assert [row["token_ids"] for row in lines[0]] == [row["token_ids"] for row in lines[1]]
    assert main([*asked, "--out", str(tmp_path / "plain"), *spread]) == 0


def test_direction_takes_the_backend(tmp_path: Path) -> None:
    (disk := tmp_path / "disk").mkdir()
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("question,matching,not_matching\n1+1=,2,3\n2+2=,4,5\n")
    asked = ["direction", "--contrast", "answers", "--pairs", str(pairs), "--layers", "2"]
    assert main([*asked, "--out", str(tmp_path / "plain")]) == 0
    spread = ["--backend", "device_map", "--offload", str(disk), "--max-memory", ROOM]
    assert main([*asked, "--out", str(tmp_path / "spread"), *spread]) == 0
    vectors = [load_file(tmp_path / name / "caa-L2.safetensors")["vector"] for name in ("plain", "spread")]
    assert torch.equal(*vectors)
