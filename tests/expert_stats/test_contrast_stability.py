"""Decisions that come back, against exact probabilities; the content of problems projected out, against the states themselves; and
both from the command line, on the dense embedded model."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_stats import decision_sites, trace_from_ids
from launch.cli.main import main
from launch.core.directions import keep_stable
from launch.core.wiring import read_any_traces
from moe_steer import load_model
from moe_steer.contrasts import (
    Behaviour,
    MarkedSequence,
    collect_contrast,
    content_subspace,
    prompt_states,
    sites_of,
    stable_sites,
    without_content,
)
from moe_steer.directions import Direction, caa, pca
from moe_steer.thinking import token_tags
from reasoning_evals.engines.sampling import nucleus

WORDS = ("Wait", "Alternatively", "Hmm")


@functools.cache
def dense() -> tuple[Any, Any]:
    return load_model("lab-dense", "plain")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stability") / "run"
    asked = ["generate", "--model", "lab-dense", "--num", "12", "--seed", "5", "--batch-size", "12"]
    assert main([*asked, "--out", str(out)]) == 0
    return out


def traces(run: Path) -> list[Any]:
    return read_any_traces([str(run)], dense()[1])


def test_what_a_trace_did_itself_is_recognised_as_coming_back(run: Path) -> None:
    _, tokenizer = dense()
    behaviour = Behaviour.of(tokenizer, token_tags(tokenizer), WORDS)  # type: ignore[arg-type]
    sequences = decision_sites(traces(run), tokenizer)
    assert len(sites_of(sequences)) > 15
    for item in sequences:
        for place in range(20, len(item.token_ids) - 12):
            prefix, after = item.token_ids[: place + 1], item.token_ids[place + 1 : place + 13]
            if place in item.positive:
                assert behaviour.returns(prefix, after, stops=True)
            if place in item.negative:
                assert behaviour.returns(prefix, after, stops=False)
            text = tokenizer.decode(after)
            if not text.lstrip().startswith("</think>"):
                assert not behaviour.returns(prefix, after, stops=True)
            if not any(word.lower() in text.lower() for word in WORDS):
                assert not behaviour.returns(prefix, after, stops=False)


def test_words_that_lead_up_to_a_switch_and_blanks_do_not_hide_it() -> None:
    _, tokenizer = dense()
    behaviour = Behaviour.of(tokenizer, token_tags(tokenizer), WORDS)  # type: ignore[arg-type]

    def back(text: str, stops: bool = False) -> bool:
        ids = functools.partial(tokenizer.encode, add_special_tokens=False)
        return behaviour.returns(ids("We add. 3 + 4 = 7."), ids(text), stops)

    assert back(" Wait, let me check.")
    assert back("\n\nBut wait, no.")
    assert not back(" So it is 7. Wait, no.")
    assert not back(" Waiting is long.")
    assert back("\n</think>\n", stops=True)
    assert not back(" So it is 7.\n</think>\n", stops=True)


def test_the_share_that_comes_back_is_the_models_probability(run: Path) -> None:
    """At a stop that follows its last token at once the exact probability of the closing tag is one forward away."""
    model, tokenizer = dense()
    tags = token_tags(tokenizer)
    assert tags is not None
    item = decision_sites(traces(run)[:1], tokenizer)[0]
    site, number = item.positive[0], 300
    only = dataclasses.replace(item, negative=())
    with torch.inference_mode():
        logits_1V = model(torch.tensor([item.token_ids[: site + 1]])).logits[:, -1]
    ids_1C, shares_1C = nucleus(logits_1V, 1.5, 1.0, 0)
    exact = float((shares_1C * (ids_1C == tags.close[0])).sum() / shares_1C.sum())
    assert exact > 0.01
    for share, kept in (
        (max(1e-6, exact - 4 * math.sqrt(exact * (1 - exact) / number) - 1e-3), 1),
        (1.0, exact > 0.9999),
    ):
        found, (stops, switches) = keep_stable(
            model,
            tokenizer,
            [only],
            WORDS,
            samples=number,
            share=min(1.0, share),
            temperature=1.5,
            top_p=1.0,
            batch_size=300,
        )
        assert (stops.sites, stops.kept, len(found)) == (1, int(kept), int(kept))
        assert (switches.sites, stops.samples) == (0, number)


def test_only_what_comes_back_often_enough_is_kept() -> None:
    item = MarkedSequence("a", tuple(range(20)), positive=(3, 5), negative=(7, 9))
    lost = MarkedSequence("b", tuple(range(20)), negative=(4,))
    shown = {("a", 3): 8, ("a", 5): 7, ("a", 7): 10, ("a", 9): 0, ("b", 4): 5}
    kept, (stops, switches) = stable_sites([item, lost], lambda site: [n < shown[site] for n in range(10)], 0.8)
    assert kept == [dataclasses.replace(item, positive=(3,), negative=(7,))]
    assert (stops.sites, stops.kept, switches.sites, switches.kept) == (2, 1, 3, 1)
    assert "1 of 2 stops (50.0%) come back in at least 80% of 10 re-generations" in stops.line
    with pytest.raises(ValueError, match="the share of re-generations is 0"):
        stable_sites([item], lambda site: [], 0.0)


def test_the_projected_contrast_is_that_of_projected_states(run: Path) -> None:
    model, tokenizer = dense()
    found = traces(run)
    sequences = decision_sites(found, tokenizer)
    prompts = list(dict.fromkeys(trace.token_ids[: trace.prompt_length] for trace in found))
    (contrast,) = collect_contrast(model, sequences, [2], weight="token", second_moments=True).values()
    states_PD = prompt_states(model, prompts, [2])[2]
    axes_KD = content_subspace(states_PD, 3)
    got = without_content(contrast, axes_KD)
    hidden: dict[str, list[torch.Tensor]] = {"positive": [], "negative": []}
    with torch.inference_mode():
        means = [
            model(torch.tensor([p]), output_hidden_states=True).hidden_states[3][0].double().mean(0) for p in prompts
        ]
        for item in sequences:
            states_SD = model(torch.tensor([item.token_ids]), output_hidden_states=True).hidden_states[3][0].double()
            for side, places in (("positive", item.positive), ("negative", item.negative)):
                hidden[side] += [states_SD[place] for place in places]
    centred_PD = torch.stack(means) - torch.stack(means).mean(0)
    assert torch.allclose(torch.stack(means), states_PD, atol=1e-4)
    axes = torch.linalg.eigh(centred_PD.T @ centred_PD).eigenvectors[:, -3:]
    keep_DD = torch.eye(len(axes), dtype=torch.float64) - axes @ axes.T
    sides = {side: torch.stack(rows) @ keep_DD for side, rows in hidden.items()}
    expected_D = sides["positive"].mean(0) - sides["negative"].mean(0)
    assert torch.allclose(caa(got).vector_D.double(), expected_D, atol=1e-3)
    assert torch.allclose(got.positive.second_DD, sides["positive"].T @ sides["positive"], rtol=1e-4, atol=1e-2)  # type: ignore[arg-type]
    assert float((axes_KD.float() @ pca(got).vector_D).abs().max()) < 1e-3
    assert got.residual_norm == contrast.residual_norm
    with pytest.raises(ValueError, match=f"the content of {len(prompts)} prompts has {len(prompts) - 1} directions"):
        content_subspace(states_PD, len(prompts))


def test_from_a_run_to_a_direction_of_stable_decisions(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["direction", "--model", "lab-dense", "--contrast", "decisions", "--traces", str(run), "--layers", "2"]
    stable = ["--regenerate", "4", "--stable-share", "0.5", "--project-content", "2"]
    assert main([*start, *stable, "--out", str(tmp_path / "stable")]) == 0
    said = capsys.readouterr().out
    assert "switches (" in said
    assert "come back in at least 50% of 4 re-generations" in said
    header = Direction.load(tmp_path / "stable" / "caa-L2.safetensors").header
    sides = {one["side"]: one for one in header["notes"]["stability"]["sides"]}
    assert header["contrast"]["positive"]["tokens"] == sides["stop"]["kept"] < sides["stop"]["sites"]
    assert header["contrast"]["negative"]["tokens"] == sides["switch"]["kept"]
    assert header["notes"]["content_projected"]["rank"] == 2
    assert "they are projected out" in said
    for wrong, message in (
        (["--stable-share", "0.5"], "--stable-share is about re-generations"),
        (["--regenerate", "4", "--stable-share", "2"], "give a share above 0, up to 1"),
        (["--project-content", "3", "--method", "sae", "--sae", "x"], "atoms are no linear function"),
    ):
        assert main([*start, *wrong, "--out", str(tmp_path / "no")]) == 1
        assert message in capsys.readouterr().err


def test_a_trace_without_a_thought_has_no_decision_to_come_back_to() -> None:
    _, tokenizer = dense()
    prompt = tokenizer.encode("What is 3 + 4?", add_special_tokens=False)
    made = trace_from_ids("a#0", prompt, tokenizer.encode("7", add_special_tokens=False), token_tags(tokenizer))
    assert sites_of(decision_sites([made], tokenizer)) == []
