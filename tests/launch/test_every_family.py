"""The whole way of every family that the library has, from a checkpoint on disk, by path and with default options.

Each step is held to a second opinion: the model that was saved, the cache of a real forward, the naive experts, the routing
that was observed, ``model.generate`` of each prompt alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from expert_stats import MarkerSet, Trace, collect_counts
from families import FAMILIES, REFUSED, available, batch
from family_cases import blocks_of, busiest, collect_routing, logits
from family_checkpoints import checkpoint
from moe_steer import ExpertGain, SteeringPlan, load_model, steer
from moe_steer.backends import plan_memory
from moe_steer.backends.rehearsal import _bytes_of
from naive_experts import naive_steering
from narrow_families import ALONE, generated, narrow, until
from reasoning_evals import Problem, grade
from reasoning_evals.engines import InProcessSampler, SamplingConfig
from reasoning_evals.engines.batch import Decoder
from reasoning_evals.runs import Arm, grade_run, read_generations, run_arms

pytestmark = pytest.mark.slow

ROWS, CONTEXT = 2, 96
"""Longer than every window."""
SIZES: dict[str, int] = {"context": CONTEXT, "batch": ROWS}
NEW_TOKENS, SAMPLES = 12, 2
PROBLEMS = [
    Problem(question, question, "42", "integer")
    for question in ("2+40?", "Wait, what is 40+2?", "40+2?", "5+37 is what?", "So: 42?")
]
CLOSE = "</think>"


@pytest.mark.parametrize("name", available())
def test_the_whole_way(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(name)
    if name in REFUSED:
        with pytest.raises(
            ValueError, match=rf"{re.escape(REFUSED[name])}.*; to measure it as it is, serve it"
        ) as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
        return
    model, tokenizer = load_model(folder, **SIZES)  # the sizes of the plan below, whose step is then rehearsed once
    assert "cannot be planned" not in capsys.readouterr().err
    loaded(name, model)
    planned(model)
    steered(name, model)
    counted(model, tokenizer)
    stops = sampled(name, model, tokenizer, tmp_path / "run")
    graded(tmp_path / "run", tokenizer, stops)


def loaded(name: str, model: Any) -> None:
    """Every tensor is the one that was saved, under the same class."""
    built = narrow(name)
    assert type(model) is type(built)
    stored, read = built.state_dict(), model.state_dict()
    assert stored.keys() == read.keys()
    assert [key for key in stored if not torch.equal(stored[key], read[key])] == []


def planned(model: Any) -> None:
    """The plan's cache is the one that a real prefill and a real step leave, to the byte."""
    plan = plan_memory(model.config, 1, 2**34, **SIZES, prompt=8, on_gpu=False)
    assert plan.footprints[0].weights == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    ids_BS = batch(ROWS, CONTEXT)
    cache = None
    for part in (slice(CONTEXT - 1), slice(CONTEXT - 1, CONTEXT)):
        with torch.no_grad():
            cache = model(
                input_ids=ids_BS[:, part],
                attention_mask=torch.ones((ROWS, part.stop), dtype=torch.long),
                position_ids=torch.arange(CONTEXT).expand(ROWS, -1)[:, part],
                past_key_values=cache,
                use_cache=True,
            ).past_key_values
    assert plan.footprints[0].cache == _bytes_of([cache, *cache.layers])


def steered(name: str, model: Any) -> None:
    """Steering the busiest expert gives what the naive experts give."""
    ids_BS, blocks = batch(), blocks_of(model)
    with collect_routing(model) as routing:
        before = logits(model, ids_BS)
    assert tuple(routing) == FAMILIES[name].moe_layers, "observed"
    first = min(routing)
    gains = {(first, busiest(routing[first][0][0])[0]): 8.0}
    with naive_steering(model, name, blocks, gains, False):
        expected = logits(model, ids_BS)
    with steer(
        model, SteeringPlan(experts=[ExpertGain(layer, e, gain) for (layer, e), gain in gains.items()])
    ) as audit:
        found = logits(model, ids_BS)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert not torch.equal(found, before)
    assert all(fired.tokens > 0 for fired in audit.fired.values())


def counted(model: Any, tokenizer: Any) -> None:
    """The counts of a trace are those of the routing that an own forward shows."""
    ids = tokenizer.encode("2+40 is 42. Wait, 2+40=42?", add_special_tokens=False)
    place = ids.index(tokenizer.convert_tokens_to_ids("\u0120Wait"))
    markers = MarkerSet.from_tokenizer(tokenizer, ["Wait"])
    counts = collect_counts(model, [Trace("a#0", tuple(ids), 4)], markers)
    with collect_routing(model) as routing:
        logits(model, torch.tensor([ids]))
    for row, (ids_TK, _) in enumerate(calls[0] for calls in routing.values()):
        here = torch.bincount(ids_TK[place], minlength=counts.grouped()["joint_GMLE"].shape[-1])
        assert counts.grouped()["joint_GMLE"].sum(0)[0, row].tolist() == here.tolist()


def sampled(name: str, model: Any, tokenizer: Any, folder: Path) -> tuple[int, ...]:
    """Greedy tokens are those of ``model.generate`` for each prompt alone: rows share prompts, have prompts of unequal lengths,
    end at different steps, and those that wait take their places. Returns the ids that end a text."""
    prompts = {p.problem_id: InProcessSampler(model, tokenizer).render(p.prompt).token_ids for p in PROBLEMS}
    assert len({len(prompt) for prompt in prompts.values()}) == len(PROBLEMS) - 1
    expected = generated(model, prompts.values(), NEW_TOKENS)
    first, second, *_ = expected.values()
    # Tokens that some answers hold early and others late or never.
    model.generation_config.eos_token_id = sorted({first[6], second[-4]})
    sampler = InProcessSampler(model, tokenizer, batch_size=4)
    assert Decoder(model, SamplingConfig(greedy=True), (), None).joins == (name not in ALONE)
    settings = SamplingConfig(greedy=True, max_new_tokens=NEW_TOKENS, batch_size=len(PROBLEMS) * SAMPLES)
    run_arms([Arm("plain", sampler)], PROBLEMS, folder, SAMPLES, settings, 0)
    made = {(one.problem_id, one.sample_idx): one.token_ids for one in read_generations(folder)}
    assert made == {
        (problem, number): until(expected[prompt], sampler.stop_ids)
        for problem, prompt in prompts.items()
        for number in range(SAMPLES)
    }
    return sampler.stop_ids


def graded(folder: Path, tokenizer: Any, stops: tuple[int, ...]) -> None:
    """A thought that does not close is never graded, and what stands behind one that closes is."""
    opening, close = tokenizer.convert_tokens_to_ids(["<think>", CLOSE])
    made = {(one.problem_id, one.sample_idx): one for one in read_generations(folder)}
    rows = {(row.problem_id, row.sample_idx): row for row in grade_run(folder)}
    assert rows.keys() == made.keys()
    for key, row in rows.items():
        one = made[key]
        ended = one.token_ids[-1] in stops
        thought = one.token_ids[: len(one.token_ids) - ended]
        assert (row.total_tokens, row.finish_reason) == (len(one.token_ids), "stop" if ended else "length")
        if close in thought:
            assert row.outcome not in ("unclosed", "correct")
            continue
        assert (row.state, row.outcome) == ("truncated", "unclosed" if ended else "truncated")
        assert (row.thinking_tokens, row.answer_tokens) == (len(thought) - thought.count(opening), 0)
        assert grade(PROBLEMS[0], f"{one.text}{CLOSE}\n\\boxed{{42}}", opened=True).outcome == "correct"
