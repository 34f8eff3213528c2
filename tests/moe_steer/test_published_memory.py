"""The memory plan of published models: parameters as their makers state them, caches by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from launch.cli.main import main
from moe_steer.backends import Unplanned, choose_backend, memory, plan_memory, skeleton
from moe_steer.backends.allocations import Bounded
from moe_steer.backends.rehearsal import rehearse_step
from published_models import FP8, MXFP4, PUBLISHED

GIB = 2**30
ROWS, T = 2, 8192


def full(layers: int, heads: int, width: int) -> int:
    """Keys and values of all tokens, bfloat16."""
    return layers * T * 2 * heads * width * 2


def window(layers: int, heads: int, width: int, size: int) -> int:
    """Keys and values of the last ``size`` tokens."""
    return layers * min(T, size) * 2 * heads * width * 2


def latent(layers: int, index: int = 0) -> int:
    """512 latent numbers and 64 rotary ones a token, and the indexer's keys."""
    return layers * T * (512 + 64 + index) * 2


def states(layers: int) -> int:
    """Qwen3.5's linear attention: 4 steps of the convolution, and 32 matrices in float32."""
    return layers * ((2 * 16 * 128 + 32 * 128) * 4 * 2 + 32 * 128 * 128 * 4)


BY_HAND: dict[str, Callable[[], int]] = {
    "gpt-oss-20b": lambda: full(12, 8, 64) + window(12, 8, 64, 128),
    "gpt-oss-120b": lambda: full(18, 8, 64) + window(18, 8, 64, 128),
    "gemma-2-2b": lambda: full(13, 4, 256) + window(13, 4, 256, 4096),
    "gemma-2-9b": lambda: full(21, 8, 256) + window(21, 8, 256, 4096),
    "gemma-2-27b": lambda: full(23, 16, 128) + window(23, 16, 128, 4096),
    "Qwen3.5-35B-A3B": lambda: full(10, 2, 256) + states(30),
    "GLM-5": lambda: latent(78, index=128),
    "Kimi-K2": lambda: latent(61),
    "DeepSeek-V3.2": lambda: latent(61, index=128),
    "MiniMax-M2": lambda: full(62, 8, 128),
}
"""Bytes of one row."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_the_maker_states(name: str) -> None:
    published = PUBLISHED[name]
    model = skeleton(CONFIG_MAPPING[published.model_type](**published.config), "bfloat16")
    of_text = sum(p.numel() for key, p in model.named_parameters() if "visual" not in key)
    stated = 2e-2 if published.billions == 1600 else 2e-3  # V4-Pro is stated as 1.6T
    assert of_text / 1e9 == pytest.approx(published.billions, rel=stated)


@pytest.mark.parametrize("name", BY_HAND)
def test_the_cache_follows_each_layers_own_kind(name: str) -> None:
    published = PUBLISHED[name]
    model = skeleton(CONFIG_MAPPING[published.model_type](**published.config), "bfloat16")
    assert rehearse_step(model, ROWS, T).cache == ROWS * BY_HAND[name]()


def test_compressed_layers_keep_a_window_and_one_entry_for_several_tokens() -> None:
    model = skeleton(CONFIG_MAPPING["deepseek_v4"](**PUBLISHED["DeepSeek-V4-Flash"].config), "bfloat16")
    sparse, heavy = 20, 23
    entries = sparse * T // 4 * (512 + 128) + heavy * T // 128 * 512
    least = ROWS * (entries * 2 + window(43, 1, 512, 128))
    assert least < rehearse_step(model, ROWS, T).cache < 1.02 * least, "beside it, what waits to be compressed"


@pytest.mark.parametrize(
    ("name", "blocks", "stored", "expanded"),
    [("gpt-oss-20b", MXFP4, 12.8, 39.0), ("gpt-oss-120b", MXFP4, 60.8, 217.6), ("Kimi-K2", FP8, 958, 1912)],
)
def test_blocks_count_as_stored_where_they_stay(
    name: str, blocks: dict[str, object], stored: float, expanded: float
) -> None:
    """Checkpoints of 12.8 and 60.8 GiB, says the model card of gpt-oss."""
    published = PUBLISHED[name]
    config = CONFIG_MAPPING[published.model_type](**published.config, dtype="bfloat16", quantization_config=blocks)
    with pytest.MonkeyPatch.context() as patch:
        for step in ("rehearse", "rehearse_step"):  # weights alone are looked at
            patch.setattr(memory, step, lambda *_: memory.Rehearsed(0, 0))
        found = {item.backend: item for item in plan_memory(config, 1, 141 * GIB).footprints}
        assert found["plain"].weights / GIB == pytest.approx(stored, rel=0.02)
        assert found["zero3"].weights / GIB == pytest.approx(expanded, rel=0.02)
        here = plan_memory(config, 1, 141 * GIB, on_gpu=False).footprints[0]
        assert here.weights / GIB == pytest.approx(expanded, rel=0.02), "a CPU expands them"


@pytest.mark.parametrize(("name", "blocks", "fits"), [("gpt-oss-20b", MXFP4, 0), ("gemma-2-27b", None, 1)])
def test_the_command_answers_for_sliding_models(
    name: str, blocks: dict[str, object] | None, fits: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published = PUBLISHED[name]
    more = {"quantization_config": blocks} if blocks else {}
    config = {"model_type": published.model_type, "dtype": "bfloat16", **published.config, **more}
    (tmp_path / "config.json").write_text(json.dumps(config))
    where = ["--gpus", "1", "--gpu-gib", "24", "--context", "8192"]
    assert main(["memory", "--model", str(tmp_path / "config.json"), *where]) == fits
    assert ("fastest that fits: plain" if fits == 0 else "none fits: use") in capsys.readouterr().out


def lab_with(tmp_path: Path, **changes: object) -> Path:
    import moe_steer.lab

    config = json.loads((Path(moe_steer.lab.__file__).parent / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    return tmp_path / "config.json"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 4_000_000}, "num_hidden_layers is 4000000 in its configuration: 1 to 500 can be built"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}},
            "its configuration says 'spiral', which this",
        ),
        ({"hidden_size": -8}, "cannot be planned"),
    ],
)
def test_wild_configurations_are_refused_in_one_line(
    changes: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = str(lab_with(tmp_path, **changes))
    assert main(["memory", "--model", where, "--gpus", "1", "--gpu-gib", "24"]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("moe-steer: ")
    assert message in said
    assert len(said) < 400


def test_a_plan_takes_a_bounded_number_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bounded, "MOST", 500)
    config = CONFIG_MAPPING["gpt_oss"](**PUBLISHED["gpt-oss-20b"].config)
    with pytest.raises(Unplanned, match="takes more than 500 steps"):
        plan_memory(config, 1, GIB)


@pytest.mark.parametrize(
    ("ranks", "offload", "expected"),
    [
        (1, "", "plain: the memory"),
        (2, "", "tp_ep: the memory"),
        (2, "cpu", "zero3: the memory"),
        (3, "", "zero3: the"),
    ],
)
def test_auto_goes_on_without_a_plan(ranks: int, offload: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise NotImplementedError("no such operator on meta tensors")

    monkeypatch.setattr(memory, "rehearse", broken)
    config = CONFIG_MAPPING["gpt_oss"](**{**PUBLISHED["gpt-oss-20b"].config, "num_hidden_layers": 2})
    backend, reason = choose_backend(config, ranks, "auto", offload)
    assert reason.startswith(expected)
    assert backend == expected.partition(":")[0]
    assert "cannot be planned (NotImplementedError: no such operator" in reason
    assert "give --backend" in reason
