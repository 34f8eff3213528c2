"""Counts: the algebra of adding, every conservation law with proof that it can fail, and files."""

from __future__ import annotations

import dataclasses
import json
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from expert_stats import MarkerSet, RoutingCounts
from expert_stats.counts import group_of, sum_counts
from stats_helpers import MARKERS, random_counts, signature

seeds = st.integers(0, 10**6)


@settings(deadline=None, max_examples=20)
@given(seeds, seeds, seeds)
def test_addition_is_associative_and_commutative(a: int, b: int, c: int) -> None:
    x, y, z = (random_counts(seed, tokens=12) for seed in (a, b, c))
    sums = [left + middle + right for left, middle, right in permutations((x, y, z))]
    assert all(other == sums[0] for other in sums)
    assert x + (y + z) == (x + y) + z
    assert (x + y).check().num_traces == x.num_traces + y.num_traces
    assert x + RoutingCounts.zeros(x.signature, x.num_groups) == x


@settings(deadline=None, max_examples=20)
@given(seeds, st.lists(st.booleans(), min_size=4, max_size=4))
def test_subsets_of_groups_add_up_again(seed: int, first: list[bool]) -> None:
    counts = random_counts(seed, tokens=12)
    chosen = [group for group, keep in enumerate(first) if keep]
    rest = [group for group, keep in enumerate(first) if not keep]
    assert counts.subset(chosen).check() + counts.subset(rest) == counts
    assert counts.subset(chosen).num_traces == len(chosen)


def test_large_counts_stay_exact() -> None:
    counts = random_counts(0)
    big = dataclasses.replace(counts, **{name: array * 10**14 for name, array in counts.arrays.items()}).check()
    assert (big + counts).num_tokens == 10**14 * counts.num_tokens + counts.num_tokens  # beyond float64's whole numbers


def change(**changes: Any) -> RoutingCounts:
    return RoutingCounts.zeros(signature(**changes), 4)


def test_routers_of_another_checkpoint_are_refused() -> None:
    with pytest.raises(ValueError, match="routers is 'abc' here and 'def' there"):
        change(routers="abc") + change(routers="def")


def test_a_fingerprint_that_could_not_be_taken_contradicts_none() -> None:
    """Under ZeRO-3 the routers of large models lie in pieces; a run that goes on under another backend still adds up."""
    known, unknown = change(routers="abc"), change(routers="")
    assert (known + unknown).signature.routers == (unknown + known).signature.routers == "abc"
    elsewhere = change(routers="", model={**signature().model, "name": "else"})
    with pytest.raises(ValueError, match="model.name is 'here' here and 'else' there"):
        known + elsewhere


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (
            change(model={**signature().model, "model_type": "qwen3_moe"}),
            "model.model_type is 'deepseek_v3' here and 'qwen3_moe' there",
        ),
        (change(model={**signature().model, "hidden_size": 9}), "model.hidden_size is 8 here and 9 there"),
        (change(model={**signature().model, "name": "else"}), "model.name is 'here' here and 'else' there"),
        (change(num_experts=5), "model.num_experts is 4 here and 5 there"),
        (change(base="all"), "base is 'generated' here and 'all' there"),
        (change(prompt_tail=0), "prompt_tail is 4 here and 0 there"),
        (change(markers=MarkerSet(markers=MARKERS.markers[:2]).to_dict()), "markers.coefficients is"),
        (
            change(markers=MarkerSet(markers=MARKERS.markers, token="first").to_dict()),
            "markers.token is 'last' here and 'first' there",
        ),
        (
            change(markers=MarkerSet(markers=MARKERS.markers, tokenizer="f00").to_dict()),
            "markers.tokenizer is '' here and 'f00' there",
        ),
        (RoutingCounts.zeros(signature(), 5), "num_groups is 4 here and 5 there"),
    ],
)
def test_another_kind_of_counts_is_refused_by_field(other: RoutingCounts, field: str) -> None:
    with pytest.raises(ValueError, match="these counts cannot be added") as caught:
        _ = random_counts(0) + other
    assert field in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_checkpoint_under_two_paths_adds_up() -> None:
    parts = [change(routers="same", model={**signature().model, "name": name}) for name in ("/b/r1", "/a/r1")]
    assert parts[0] + parts[1] == parts[1] + parts[0]
    assert (parts[0] + parts[1]).signature.model["name"] == "/a/r1"


def test_versions_are_kept_side_by_side() -> None:
    assert (random_counts(0) + random_counts(1)).versions == {"torch": ("2.0", "2.1")}


def broken(name: str, at: tuple[int, ...], by: int) -> RoutingCounts:
    counts = random_counts(3)
    arrays = {key: array.copy() for key, array in counts.arrays.items()}
    arrays[name][at] += by
    return dataclasses.replace(counts, **arrays)


@pytest.mark.parametrize(
    ("counts", "law"),
    [
        (broken("expert_GLE", (0, 0, 0), 1), "selections per layer == tokens x top-k"),
        (broken("total_G", (1,), 1), "selections per layer == tokens x top-k"),
        (broken("joint_GMLE", (0, 0, 0, 0), 1), "selections at a marker per layer == occurrences x top-k"),
        (broken("marker_GM", (0, 0), 1), "selections at a marker per layer == occurrences x top-k"),
        (broken("joint_GMLE", (0, 0, 0, 0), -99), "joint_GMLE holds the negative count"),
        (broken("num_traces_G", (2,), -1), "a group without traces has no tokens"),
    ],
)
def test_each_law_can_fail(counts: RoutingCounts, law: str) -> None:
    with pytest.raises(ValueError, match=law):
        counts.check()


def shifted(name: str, size: int) -> RoutingCounts:
    """Move selections from the last expert to the first, so that sums over experts stay."""
    counts = random_counts(3)
    arrays = {key: array.copy() for key, array in counts.arrays.items()}
    arrays[name][..., 0] += size
    arrays[name][..., -1] = np.maximum(arrays[name][..., -1] - size, 0)
    arrays[name][..., 0] -= arrays[name].sum(-1) - counts.arrays[name].sum(-1)
    return dataclasses.replace(counts, **arrays)


def test_laws_between_cells_can_fail() -> None:
    with pytest.raises(ValueError, match="selections of an expert <= tokens"):
        shifted("expert_GLE", 50).check()
    with pytest.raises(ValueError, match="joint <= occurrences of the marker"):
        shifted("joint_GMLE", 50).check()
    counts = random_counts(3)
    with pytest.raises(ValueError, match="joint <= selections of the expert"):
        two_experts = np.zeros_like(counts.expert_GLE)  # take every selection, and the markers' other experts none
        two_experts[..., :2] = counts.total_G[:, None, None]
        dataclasses.replace(counts, expert_GLE=two_experts).check()


@pytest.mark.parametrize("wrong", [np.float32, np.int32])
def test_other_number_types_are_refused(wrong: type) -> None:
    counts = random_counts(0)
    with pytest.raises(ValueError, match="expert_GLE is .*: expected int64"):
        dataclasses.replace(counts, expert_GLE=counts.expert_GLE.astype(wrong)).check()


def test_a_file_gives_back_the_same_counts_bit_for_bit(tmp_path: Path) -> None:
    counts = random_counts(5)
    for name in ("a.safetensors", "b.safetensors"):
        counts.save(tmp_path / "deep" / name)
    assert RoutingCounts.load(tmp_path / "deep" / "a.safetensors") == counts
    assert RoutingCounts.load(tmp_path / "deep" / "a.safetensors").digest() == counts.digest()
    first, second = ((tmp_path / "deep" / name).read_bytes() for name in ("a.safetensors", "b.safetensors"))
    assert first == second
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["a.safetensors", "b.safetensors"]


def test_broken_counts_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the counts break the law"):
        broken("total_G", (0,), 1).save(tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    counts, path = random_counts(5), tmp_path / "c.safetensors"
    counts.save(path)
    content = path.read_bytes()
    head: dict[str, Any] = {"version": 1, "signature": counts.signature.to_dict(), "versions": {}}
    arrays = dict(counts.arrays)
    cases: dict[str, Any] = {
        "is not a whole safetensors file": lambda: path.write_bytes(content[:-8]),
        "is not a whole safetensors file ": lambda: path.write_bytes(b"{}"),
        "and no routing counts": lambda: save_file({"weight": np.zeros(3)}, path),
        "its version is 9, this program reads version 1": lambda: save_file(
            arrays, path, {"routing_counts": json.dumps({**head, "version": 9})}
        ),
        "cannot be used: .*unexpected keyword": lambda: save_file(
            arrays, path, {"routing_counts": json.dumps({**head, "signature": {**head["signature"], "x": 1}})}
        ),
        "cannot be used: the counts break the law": lambda: save_file(
            {**arrays, "total_G": arrays["total_G"] + 1}, path, {"routing_counts": json.dumps(head)}
        ),
        "there is no counts file": path.unlink,
    }
    for message, spoil in cases.items():
        spoil()
        with pytest.raises(ValueError, match=message) as caught:
            RoutingCounts.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_groups_are_stable_and_keep_samples_of_a_problem_together() -> None:
    assert [group_of(f"p-{index}", 16) for index in range(6)] == [group_of(f"p-{index}#3", 16) for index in range(6)]
    assert group_of("p-1", 16) == 3  # pinned: files of other days must add up
    assert group_of("#1", 16) == group_of("#1", 16)
    spread = np.bincount([group_of(f"p-{index}", 16) for index in range(1600)], minlength=16)
    assert spread.min() > 60


def test_a_sum_needs_something_to_add() -> None:
    assert sum_counts([random_counts(1)]) == random_counts(1)
    with pytest.raises(ValueError, match="there are no counts to add"):
        sum_counts([])
