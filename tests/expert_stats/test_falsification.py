"""Thought or token: where experts and atoms are tried, the verdict of each kind, and planted experts on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from expert_stats import MarkerSet, Trace
from expert_stats.causes import Probe, falsify, probes_of, table_of, verdict_of
from expert_stats.causes.falsification import VERDICTS, Rate, rates_of
from launch.cli.main import main
from launch.core.wiring import read_any_traces
from moe_steer import load_model
from moe_steer.hooks import call_hooks
from moe_steer.layers import moe_layers
from moe_steer.tokens import Marker
from moe_steer.tokens.traces import write_traces

TEXTS = [
    "The river runs past the old mill.", "In 1984 the town had 12 shops and 3 schools.", "She bought bread, milk and 6 eggs.",
    "The train to the coast leaves at noon.", "Iron is heavier than water.", "My brother paints houses in the summer.",
    "There were 40 birds on the wire.", "A square has 4 equal sides.", "The shop closes at 8 on Monday.",
    "Rain fell on the hills all night.", "Each box holds 24 pens.", "The dog sleeps by the door.",
]  # fmt: skip


def rate(mean: float, error: float = 0.02, units: int = 40) -> Rate:
    return Rate(mean=mean, error=error, units=units, places=units * 3)


@pytest.mark.parametrize(
    ("thought", "elsewhere", "injected", "matched", "verdict"),
    [
        (0.9, 0.88, 0.9, 0.1, "token"),
        (0.9, 0.1, 0.9, 0.1, "token"),
        (0.9, 0.1, 0.1, 0.1, "both"),
        (0.9, 0.1, 0.1, 0.85, "thought"),
        (0.9, 0.9, 0.9, 0.9, "neither"),
        (0.0, 0.0, 0.0, 0.0, "neither"),
        (0.9, 0.43, 0.9, 0.43, "token"),
        (0.9, 0.43, 0.1, 0.1, "both"),
        (0.05, 0.03, 0.02, 0.03, "open"),
    ],
)
def test_each_pattern_has_its_verdict(
    thought: float, elsewhere: float, injected: float, matched: float, verdict: str
) -> None:
    rates = {
        "thought": rate(thought),
        "elsewhere": rate(elsewhere),
        "injected": rate(injected),
        "matched": rate(matched),
    }
    assert verdict_of(rates, 0.01) == verdict


def test_the_words_say_no_more_than_was_tested() -> None:
    """Six tenths of the rate in thoughts are "as well" by the rule, and less often all the same."""
    rates = {"thought": rate(0.9), "elsewhere": rate(0.1), "injected": rate(0.1), "matched": rate(0.6)}
    assert verdict_of(rates, 0.01) == "thought"
    rates |= {"injected": rate(0.6), "matched": rate(0.1)}
    assert verdict_of(rates, 0.01) == "token"
    assert all("at least half" in VERDICTS[name] for name in ("thought", "token", "neither"))


def test_few_units_show_nothing() -> None:
    rates = {
        name: rate(mean, error=0.0, units=2) for name, mean in (("thought", 0.9), ("injected", 0.1), ("matched", 0.1))
    }
    assert verdict_of(rates, 0.01) == "open"
    assert verdict_of({**rates, "injected": rate(0.1, float("nan"), 1)}, 0.01) == "open"
    large = {name: rate(one.mean, 0.0, 40) for name, one in rates.items()}
    assert verdict_of(large, 0.01) == "both"


def test_places_of_each_condition() -> None:
    markers = MarkerSet(markers=(Marker("x", ((7, 8), (9,))),), coefficients=(1.0,))
    traces = [
        Trace("a#0", (9, 1, 2, 9, 3, 7, 8, 4, 4, 9, 5), 2, 2, 8),  # the thought is 2 .. 7
        Trace("b#0", (1, 9, 6, 6, 6, 3, 2, 9), 2, 2, None),
        Trace("c#0", (9, 9), 1),
    ]
    found, matched = probes_of(traces, [[1, 2, 3], [4]], markers, seed=3)
    assert found[0].places["thought"] == (3, 6)
    assert found[0].places["elsewhere"] == (0, 9)
    assert found[1].places["thought"] == (1, 7), "the tag that opens a thought is of it"
    assert found[2].places["thought"] == ()
    assert found[2].places["elsewhere"] == (0, 1)
    assert set(matched) == {2, 3, 4, 6}
    assert found[0].places["matched"] == (2, 4, 7)
    injected, neutral = found[3:]
    assert injected.unit == neutral.unit
    (place,) = injected.places["injected"]
    ids = injected.trace.token_ids
    assert ids[place] == 9, "the form that thoughts have most often"
    assert ids[:place] + ids[place + 1 :] == (1, 2, 3)
    assert neutral.places["neutral"] == (0, 1, 2)
    with pytest.raises(ValueError, match="stands in no thought"):
        probes_of(traces[2:], [[1, 2]], markers)
    with pytest.raises(ValueError, match="no neutral texts"):
        probes_of(traces, [[1]], markers)


def test_rates_are_means_over_problems_not_over_places() -> None:
    probes = [
        Probe(trace=Trace(name, (1, 2, 3, 4), 0), unit=unit, places={"thought": places})
        for name, unit, places in (("a#0", "a", (0, 1)), ("a#1", "a", (0, 1)), ("b#0", "b", (3,)))
    ]
    fired = [np.array([1, 1, 0, 0], bool), np.array([1, 0, 0, 0], bool), np.array([0, 0, 0, 0], bool)]
    found = rates_of(probes, fired)["thought"]
    assert (found.mean, found.units, found.places) == (0.375, 2, 5)
    assert found.error == pytest.approx(0.375)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("falsify")
    assert main(["generate", "--num", "40", "--max-new-tokens", "120", "--out", str(folder / "run")]) == 0
    (folder / "texts.txt").write_text("\n".join(TEXTS * 2))
    return folder


@pytest.mark.parametrize("kind", ["token", "thought", "both"])
def test_a_planted_expert_is_called_what_it_is(kind: str, run: Path) -> None:
    model, tokenizer = load_model("lab")
    traces = read_any_traces([str(run / "run")], tokenizer)
    markers = MarkerSet.from_tokenizer(tokenizer, ("So",))
    texts = [tokenizer(text)["input_ids"] for text in TEXTS * 2]
    probes, _ = probes_of(traces, texts, markers)
    layer = moe_layers(model)[-1]
    inputs: list[torch.Tensor] = []
    with (
        torch.no_grad(),
        call_hooks(layer.block, lambda call: inputs.append(next(iter(call.values()))[0]), lambda *_: None),
    ):
        for probe in probes:
            model(torch.tensor([probe.trace.token_ids]))
    hidden_TD = torch.cat(inputs)
    there_T = torch.cat([_fires(probe, kind) for probe in probes])
    weight_T = torch.where(there_T, (~there_T).sum() / there_T.sum(), 1.0)
    for _ in range(3):  # least squares, then again with more weight on what came out on the wrong side
        gram = (hidden_TD * weight_T[:, None]).T @ hidden_TD + 1e-3 * torch.eye(hidden_TD.shape[1])
        row_D = torch.linalg.solve(gram, (hidden_TD * weight_T[:, None]).T @ torch.where(there_T, 12.0, -12.0))
        weight_T = weight_T * torch.where((hidden_TD @ row_D > 0) == there_T, 1.0, 4.0)
    router: Any = layer.router
    router.weight.data[5] = row_D
    router.e_score_correction_bias.data[5] = router.e_score_correction_bias.data.mean()
    (row,) = falsify(model, probes, [(layer.index, 5)])
    assert row.verdict == kind, table_of([row])


def _fires(probe: Probe, kind: str) -> torch.Tensor:
    at = torch.zeros(len(probe.trace.token_ids), dtype=torch.bool)
    if kind == "thought" and probe.trace.thought_start is not None:
        at[probe.trace.thought_start : probe.trace.thought_end] = True
    names = {"token": ("thought", "elsewhere", "injected"), "both": ("thought",), "thought": ()}[kind]
    at[[place for name in names for place in probe.places.get(name, ())]] = True
    return at


def test_the_lab_is_told_apart_on_the_command_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["falsify", "lab", "--traces", str(run / "run"), "--texts", str(run / "texts.txt")]
    assert main([*given, "--experts", "2:8", "1:5", "--out", str(tmp_path / "f.json")]) == 0
    said = capsys.readouterr().out
    assert "answers to the token" in said
    data = json.loads((tmp_path / "f.json").read_text())
    assert [row["verdict"] for row in data["rows"]] == ["token", "neither"]
    for more, message in (
        ([], "nothing to try"),
        (["--experts", "9:1"], "does not exist"),
        (["--experts", "x"], "write LAYER:EXPERT"),
        (["--atoms", "1:1"], "give both or neither"),
        (["--experts", "2:8", "--top", "3"], "--top 3 is for --scores"),
    ):
        assert main([*given, *more]) == 1
        assert message in capsys.readouterr().err


def test_atoms_are_tried_where_the_sae_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against the SAE's own encoding of the residual stream, sequence by sequence."""
    from moe_steer import lab
    from moe_steer.saes import load_sae

    folder = Path(lab.__file__).parent / "dense_sae"
    sae = load_sae(folder)
    layer = sae.about.layer
    model, tokenizer = load_model("lab-dense")
    thoughts = [
        tokenizer(f"<think>2 + {n} = {n + 2}. So it is {n + 2}.</think>So {n + 2}.", add_special_tokens=False)[
            "input_ids"
        ]
        for n in range(6)
    ]
    start = [ids.index(tokenizer.convert_tokens_to_ids("<think>")) + 1 for ids in thoughts]
    end = [ids.index(tokenizer.convert_tokens_to_ids("</think>")) for ids in thoughts]
    traces = [Trace(f"p{n}#0", tuple(ids), 0, start[n], end[n]) for n, ids in enumerate(thoughts)]
    write_traces(tmp_path / "t.jsonl", traces)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    probes, _ = probes_of(traces, texts, MarkerSet.from_tokenizer(tokenizer, ("So",)))
    active = []
    for probe in probes[:6]:
        with torch.no_grad():
            hidden = model(torch.tensor([probe.trace.token_ids]), output_hidden_states=True).hidden_states
        active.append(sae.encode(hidden[layer + 1][0])[list(probe.places["thought"])] > 0)
    mean_F = torch.stack([one.float().mean(0) for one in active]).mean(0)
    atom = int(mean_F.argmax())
    (row,) = falsify(model, probes, atoms=[(layer, atom)], saes={layer: sae})
    assert row.rates["thought"].mean == pytest.approx(float(mean_F[atom]))
    words = [
        "falsify",
        "lab-dense",
        "--traces",
        str(tmp_path / "t.jsonl"),
        "--texts",
        str(tmp_path / "texts.txt"),
        "--marker",
        "So",
    ]
    assert main([*words, "--atoms", f"{layer}:{atom}", "--sae", str(folder)]) == 0
    assert f"layer {layer} atom {atom}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="need an SAE of that layer"):
        falsify(model, probes, atoms=[(layer, 10**6)], saes={layer: sae})
