"""``moe-steer inspect``: from a run folder to the tokens at which experts fire, against routing taken down by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launch.cli.main import main
from launch.core.options import ModelOptions
from launch.core.trace_views import texts_of
from moe_steer import load_model
from moe_steer.layers import moe_layers
from reasoning_evals.report import TraceViews
from reasoning_evals.runs import read_generations


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect") / "plain"
    assert main(["generate", "--num", "3", "--max-new-tokens", "60", "--out", str(folder)]) == 0
    return folder


def test_a_plain_run_is_recorded_and_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run), "--experts", "1:3", "2:8", "--num", "2", "--model", "lab"]) == 0
    shown = capsys.readouterr().out
    assert "layer 2 expert 8" in shown
    assert "named" in shown
    assert "traces.html" in shown
    views = TraceViews.load(run)
    assert len(views.traces) == 2
    model, tokenizer = load_model("lab")
    answers = list(read_generations(run))
    for view, item in zip(views.traces, answers, strict=False):
        ids = [*tokenizer(item.prompt, add_special_tokens=False)["input_ids"], *item.token_ids]
        selected: dict[int, list[list[int]]] = {}
        handles = [
            layer.router.register_forward_hook(
                lambda _, __, out, at=layer.index, found=selected: found.__setitem__(at, out[2].tolist())
            )
            for layer in moe_layers(model)
            if layer.router is not None
        ]
        with torch.no_grad():
            model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        for layer, expert in [(1, 3), (2, 8)]:
            wanted = [at for at, row in enumerate(selected[layer]) if expert in row]
            assert list(view.fired.get(f"layer {layer} expert {expert}", {"at": []})["at"]) == wanted
        assert "".join(view.tokens) == item.prompt + tokenizer.decode(item.token_ids, skip_special_tokens=False)
        assert view.prompt_length == len(ids) - len(item.token_ids)
    assert main(["inspect", str(run), "--each"]) == 0, "shown again without the model"
    assert "sample 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing"], "missing"),
        (["RUN", "--experts", "3"], "write LAYER:EXPERT"),
        (["RUN", "--experts", "1:99", "--model", "lab"], "expert 99 of layer 1 does not exist"),
        (["RUN", "--num", "0", "--again"], "num is 0"),
        (["RUN", "--again", "--model", "lab"], "names no experts: give some as --experts"),
    ],
)
def test_wrong_input_is_one_line(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *[str(run) if word == "RUN" else word for word in arguments]]) in (1, 2)
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("kept", [True, False])
def test_the_model_is_asked_for_as_the_run_asked(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, asked = tmp_path / "run", []
    words = ["--dtype", "bfloat16", "--revision", "main", "--system", "Be brief.", "--thinking", "<think>...</think>"]
    start = ["generate", "--num", "1", "--max-new-tokens", "4", "--out", str(folder)]
    assert main([*start, *words]) == 0
    assert main([*start[:-2], "--out", str(tmp_path / "usual")]) == 0
    run, usual = (json.loads((one / "run.json").read_text()) for one in (folder, tmp_path / "usual"))
    assert run["config"].keys() == usual["config"].keys(), "the config is as it was"
    if not kept:  # as in older runs
        del run["options"]
        (folder / "run.json").write_text(json.dumps(run))

    def stop(options: ModelOptions, **_: object) -> None:
        asked.append(options)
        raise ValueError("asked")

    monkeypatch.setattr("launch.core.session.load_asked", stop)
    assert main(["inspect", str(folder), "--experts", "1:3"]) == 1
    assert capsys.readouterr().err.endswith("moe-steer: asked\n")
    wanted = {"dtype": "bfloat16", "revision": "main", "system": "Be brief.", "thinking": "<think>...</think>"}
    assert asked == [ModelOptions(model="lab", **(wanted if kept else {}))]  # type: ignore[arg-type]


def test_characters_of_several_tokens_are_whole() -> None:
    _, tokenizer = load_model("lab")
    text = "So 3 \u00d7 4 = \u2211 \U0001f600 and \u4f60\u597d."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = texts_of(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == tokenizer.decode(ids)
