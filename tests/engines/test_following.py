"""Requests that come, are cut in pieces, read from a cache, pushed aside and taken up again: each token's row against its text."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch

import tiny
from moe_steer import ExpertGain, ResidualVector, SteeringPlan
from moe_steer.tokens import PositionTracker, special_tokens
from moe_steer_vllm.following import Following, Step, sample_of
from moe_steer_vllm.served import Served, channels

V = torch.ones(4)
PLANS = {
    "all": SteeringPlan(experts=[ExpertGain(1, 0, 2.0)]),
    "thought": SteeringPlan(
        experts=[ExpertGain(1, 0, 2.0)],
        scope="thought",
        residual=[
            ResidualVector(1, vector=V, scope="answer"),
            ResidualVector(2, vector=V, scope="step_end:sentence+stop"),
        ],
    ),
    "late": SteeringPlan(
        residual=[ResidualVector(1, vector=V, scope="after:2"), ResidualVector(1, vector=V, scope="prompt")]
    ),
}
SPECIAL = special_tokens(tiny.TinyTokenizer())
IDS = [1, 2, 10, 11, 12, 21, 22, 30, 31, 40, 41, 50, tiny.THINK, tiny.END_THINK]
ASKED = [None, "off", "all", "thought", "thought*0.5", "late"]
SLOTS, LONGEST = 3, 64


@dataclass
class Request:
    """One that the engine knows; ``fed``: tokens that were computed, or read from the cache."""

    name: str
    ids: list[int]
    prompt: int
    asked: str | None
    fed: int = 0
    came: bool = False
    counted: int = 0
    in_scope: list[int] = field(default_factory=lambda: [0, 0, 0])


def expected(request: Request) -> list[list[bool]]:
    """By channel of its plan: which of all its tokens are in scope."""
    name = (request.asked or "off").partition("*")[0]
    found = []
    for scope in channels(PLANS[name]) if name in PLANS else []:
        track = PositionTracker([scope], SPECIAL, [request.prompt])
        track.before({"input_ids": torch.tensor([request.ids]), "use_cache": False})
        mask_T = track.mask(scope)
        found.append([True] * len(request.ids) if mask_T is None else mask_T.tolist())
    return found


@pytest.mark.parametrize("seed", range(60))
def test_every_token_runs_under_what_its_request_asked_for(seed: int) -> None:
    draw = random.Random(seed)
    following = Following(Served(PLANS), SPECIAL, LONGEST, SLOTS, "cpu")
    texts = [draw.choices(IDS, k=draw.randint(2, 12)) for _ in range(draw.randint(1, 6))]
    requests = [
        Request(f"cmpl-{n}-0-01234567", ids, draw.randint(1, len(ids)), draw.choice(ASKED))
        for n, ids in enumerate(texts)
    ]
    ended: list[Request] = []
    while waiting := [one for one in requests if one not in ended]:
        chosen = draw.sample(waiting, draw.randint(1, min(SLOTS, len(waiting))))
        for one in chosen:
            if not one.came:
                one.came = True
                one.fed = draw.choice([0, draw.randint(0, one.prompt - 1)])  # some of it is read from the prefix cache
                following.come(one.name, None if one.asked is None else {"moe_steer": one.asked})
            elif draw.randint(0, 5) == 0:  # preempted, and computed again
                one.fed = draw.randint(0, one.fed)
                following.come(one.name, None if one.asked is None else {"moe_steer": one.asked})
            one.fed = min(one.fed, len(one.ids) - 1)
        counts = [draw.randint(1, len(one.ids) - one.fed) for one in chosen]
        flat = torch.tensor([i for one, n in zip(chosen, counts, strict=True) for i in one.ids[one.fed : one.fed + n]])
        step = Step(
            [one.name for one in chosen],
            np.array(counts),
            np.array([one.fed for one in chosen]),
            np.array([one.prompt for one in chosen]),
            lambda r, n, chosen=chosen: torch.tensor(chosen[r].ids[:n], dtype=torch.int32),  # type: ignore[misc]
        )
        following.step(step, lambda flat=flat: flat)  # type: ignore[misc]
        at = 0
        for one, n in zip(chosen, counts, strict=True):
            inside = expected(one)
            row = list(PLANS).index((one.asked or "off").partition("*")[0]) + 1 if inside else 0
            for channel, rows_N in enumerate(following.tokens.rows_CN):
                wanted = [row * inside[channel][one.fed + k] if channel < len(inside) else 0 for k in range(n)]
                assert rows_N[at : at + n].tolist() == wanted, (one, channel)
            if inside:
                assert set(following.tokens.dose_N[at : at + n].tolist()) == {0.5 if "*" in str(one.asked) else 1.0}
                # A kernel that counts: one hit a token, in the first column of the plan.
                for k in range(n):
                    following.tokens.hits[int(following.tokens.base_N[at + k]) + 1 + sum((1, 3, 2)[: row - 1])] += 1
                one.counted += n
            at += n
            one.fed += n
        assert not following.tokens.rows_CN[:, at:].any(), "padding is steered by nobody"
        unsteered_N = following.tokens.rows_CN.sum(0) == 0
        spare_N = following.tokens.spare_N
        assert torch.equal(following.tokens.base_N[at:], spare_N[at:])
        assert not (following.tokens.base_N[~unsteered_N] >= spare_N[0]).any()
        gone = [one for one in chosen if one.fed == len(one.ids)]
        ended += gone
        following.go([one.name for one in gone])
    for one in requests:
        samples = following.of_request(one.name.rsplit("-", 2)[0])
        assert [sample["tokens"] for sample in samples] == ([one.counted] if one.counted else [])
        assert [sample["hits"][0] for sample in samples] == ([one.counted] if one.counted else [])
    for name in PLANS:
        mine = sum(one.counted for one in requests if (one.asked or "").partition("*")[0] == name)
        assert following.status()[name]["tokens"] == following.status()[name]["hits"][0] == mine
    assert len(following._free) == SLOTS


def test_a_batch_without_a_steered_request_is_not_touched_and_a_dummy_run_steers_nobody() -> None:
    following = Following(Served(PLANS), SPECIAL, LONGEST, SLOTS, "cpu")
    following.come("a", {"moe_steer": "all"})
    step = Step(["a", "b"], np.array([3, 2]), np.array([0, 0]), np.array([3, 2]), lambda r, n: torch.zeros(n))
    following.step(step, lambda: torch.ones(5, dtype=torch.long))
    assert following.tokens.rows_CN[0].nonzero().flatten().tolist() == [0, 1, 2]
    following.neutral()
    assert not following.tokens.rows_CN.any()
    following.go(["a"])

    def never() -> torch.Tensor:
        raise AssertionError("ids were read")

    following.step(step, never)
    assert not following.tokens.rows_CN.any()


def test_an_eager_engine_that_measures_its_memory_reads_the_tables() -> None:
    """Else what steering needs is missing when the first steered batch comes, and the cache has all the rest."""
    following = Following(Served(PLANS), SPECIAL, LONGEST, SLOTS, "cpu", eager=True)
    assert following.tokens.idle
    following.rehearse()
    assert not following.tokens.idle
    assert not following.tokens.rows_CN.any()
    step = Step(["b"], np.array([2]), np.array([0]), np.array([2]), lambda r, n: torch.zeros(n))
    following.step(step, lambda: torch.ones(2, dtype=torch.long))
    assert following.tokens.idle


def test_a_step_like_the_last_one_writes_nothing_and_counts_on() -> None:
    following = Following(Served(PLANS), SPECIAL, LONGEST, SLOTS, "cpu")
    for name, asked in (("a", "all"), ("b", "off"), ("c", "thought")):
        following.come(name, {"moe_steer": asked})
    masks = following._scopes.masks
    asked_for = []
    following._scopes.masks = lambda *a: (asked_for.append(1), masks(*a))[1]  # type: ignore[method-assign]

    def step(names: list[str], before: int) -> list[list[int]]:
        counts = np.ones(len(names), dtype=np.int32)
        made = Step(names, counts, counts * before, counts, lambda r, n: torch.zeros(n, dtype=torch.long))
        following.step(made, lambda: torch.full((len(names),), tiny.THINK))
        return following.tokens.rows_CN[:, :3].tolist()

    first = step(["a", "b"], 1)
    asked_for.clear()
    assert [step(["a", "b"], before) for before in (2, 3)] == [first, first]
    assert asked_for == []
    assert step(["b", "a"], 4)[0] == [0, 1, 0], "another order is another batch"
    following.neutral()
    assert step(["b", "a"], 5)[0] == [0, 1, 0], "a dummy run in between has cleared the rows"
    assert following.status()["all"]["tokens"] == 5
    asked_for.clear()
    for before in (1, 2):
        step(["c"], before)
    assert len(asked_for) > 1, "a scope that follows the text is computed at every step"


def test_requests_are_remembered_up_to_a_number() -> None:
    following = Following(Served({"all": PLANS["all"]}), None, LONGEST, SLOTS, "cpu")
    following._done, following._done_of = following._done[:2], following._done_of[:2]
    for n in range(3):
        following.come(f"cmpl-{n}-0-01234567", {"moe_steer": "all"})
        following.go([f"cmpl-{n}-0-01234567"])
    assert [len(following.of_request(f"cmpl-{n}")) for n in range(3)] == [0, 1, 1]
    assert set(following._of_reply) == {"cmpl-1", "cmpl-1-0", "cmpl-2", "cmpl-2-0"}, "what is forgotten takes no room"


def test_whose_reply_a_request_of_the_engine_is() -> None:
    assert sample_of("cmpl-a0-2-01234567", "cmpl-a0") == (2, 0)
    assert sample_of("3_cmpl-a0-2-01234567", "cmpl-a0") == (2, 3)
    assert sample_of("chatcmpl-a0-01234567", "chatcmpl-a0") == (0, 0)
    assert sample_of("chatcmpl-a0-01234567", "cmpl-a0") is None
    assert sample_of("cmpl-a01-2-01234567", "cmpl-a0") is None
