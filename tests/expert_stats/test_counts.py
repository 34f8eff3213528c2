"""Counts: the algebra of adding, every conservation law with proof that it can fail, and files."""

from __future__ import annotations

import dataclasses
import json
import zlib
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from expert_stats import MarkerSet, RoutingCounts, TraceCounts
from expert_stats.counts import group_of, sum_counts
from expert_stats.trace_counts import NUM_BINS
from moe_steer.files import read_tensors
from stats_helpers import MARKERS, changed, random_counts, signature, subset

seeds = st.integers(0, 10**6)


@settings(deadline=None, max_examples=20)
@given(seeds, seeds, seeds)
def test_addition_is_associative_and_commutative(a: int, b: int, c: int) -> None:
    x, y, z = (random_counts(seed, tokens=12, prefix=f"{part}-{seed}") for part, seed in enumerate((a, b, c)))
    sums = [left + middle + right for left, middle, right in permutations((x, y, z))]
    assert all(other == sums[0] for other in sums)
    assert x + (y + z) == (x + y) + z
    assert (x + y).check().num_traces == x.num_traces + y.num_traces
    assert x + RoutingCounts.zeros(x.signature, x.versions) == x


@settings(deadline=None, max_examples=20)
@given(seeds, st.lists(st.booleans(), min_size=4, max_size=4))
def test_subsets_of_traces_add_up_again(seed: int, first: list[bool]) -> None:
    counts = random_counts(seed, tokens=12)
    chosen = [number for number, keep in enumerate(first) if keep]
    rest = [number for number, keep in enumerate(first) if not keep]
    assert subset(counts, chosen).check() + subset(counts, rest) == counts
    assert subset(counts, chosen).num_traces == len(chosen)


def test_the_same_trace_twice_is_refused_and_another_text_of_that_name_is_not() -> None:
    counts = random_counts(0)
    with pytest.raises(ValueError, match="trace '0-0#0' is there twice with the same text: add every trace once"):
        _ = counts + subset(counts, [0])
    other = dataclasses.replace(counts.traces[0], digest="another text")
    assert (counts + dataclasses.replace(counts, traces=(other,))).num_traces == 5


@pytest.mark.parametrize("largest", [0, 255, 256, 65535, 65536, 10**12])
def test_counts_of_any_size_are_packed_without_loss(largest: int) -> None:
    rng = np.random.default_rng(largest % 97)
    expert_BLE = rng.integers(0, largest + 1, (NUM_BINS, 2, 5))
    joint_MLE = rng.integers(0, largest // 3 + 1, (3, 2, 5))
    total_B = np.ones(NUM_BINS, np.int64)
    total_B[3] = 0
    expert_BLE[3] = 0
    trace = TraceCounts.pack("a", expert_BLE, joint_MLE, np.zeros((3, NUM_BINS), np.int64), total_B)
    for found, packed in zip(trace.expert_and_joint(2, 5, verify=True), (expert_BLE, joint_MLE), strict=True):
        np.testing.assert_array_equal(found, packed)
    spoilt = dataclasses.replace(trace, content="0")
    with pytest.raises(ValueError, match="trace 'a' are damaged .another checksum.: collect them again"):
        spoilt.expert_and_joint(2, 5, verify=True)
    with pytest.raises(ValueError, match="have another size than their header"):
        trace.expert_and_joint(2, 6) if largest else dataclasses.replace(
            trace, packed=zlib.compress(b"a")
        ).expert_and_joint(2, 5)


def test_large_counts_stay_exact() -> None:
    counts = random_counts(0)
    big = changed(
        counts,
        0,
        **{name: np.asarray(array, np.int64) * 10**14 for name, array in arrays_of(counts, 0).items()},
    ).check()
    more = 10**14 * int(counts.traces[0].total_B.sum()) + int(sum(t.total_B.sum() for t in counts.traces[1:]))
    assert big.num_tokens == more  # beyond float64's whole numbers
    assert int(big.grouped()["expert_GLE"].sum()) == 2 * 2 * more


def arrays_of(counts: RoutingCounts, number: int) -> dict[str, Any]:
    trace = counts.traces[number]
    expert_BLE, joint_MLE = trace.expert_and_joint(len(counts.moe_layers), counts.num_experts)
    small = {"marker_MB": trace.marker_MB.copy(), "total_B": trace.total_B.copy()}
    return {"expert_BLE": expert_BLE.copy(), "joint_MLE": joint_MLE.copy(), **small}


def change(**changes: Any) -> RoutingCounts:
    return RoutingCounts.zeros(signature(**changes))


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
    array = arrays_of(counts, 0)[name].astype(np.int64)
    array[at] += by
    return changed(counts, 0, **{name: array})


@pytest.mark.parametrize(
    ("counts", "law"),
    [
        (broken("expert_BLE", (1, 0, 0), 1), "selections per layer == tokens x top-k"),
        (broken("total_B", (1,), 1), "selections per layer == tokens x top-k"),
        (broken("joint_MLE", (0, 0, 0), 1), "selections at a marker per layer == occurrences x top-k"),
        (broken("marker_MB", (0, 1), 1), "selections at a marker per layer == occurrences x top-k"),
    ],
)
def test_each_law_can_fail(counts: RoutingCounts, law: str) -> None:
    with pytest.raises(ValueError, match=f"{law} .trace '3-0#0'; 2 layers, 4 experts, top-2"):
        counts.check()


def test_counts_below_zero_fractions_and_traces_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="joint_MLE of trace '3-0#0' holds int64 or counts below 0"):
        broken("joint_MLE", (0, 0, 0), -99)
    counts = random_counts(3)
    with pytest.raises(ValueError, match="expert_BLE of trace '3-0#0' holds float32 or counts below 0"):
        changed(counts, 0, expert_BLE=arrays_of(counts, 0)["expert_BLE"].astype(np.float32))
    negative = dataclasses.replace(counts.traces[0], total_B=counts.traces[0].total_B * -1)
    with pytest.raises(ValueError, match="'3-0#0' "):
        dataclasses.replace(counts, traces=(negative,)).check()
    nobody = dataclasses.replace(counts.traces[0], num_traces=0)
    with pytest.raises(ValueError, match="a group without traces has no tokens"):
        dataclasses.replace(counts, traces=(nobody,)).check()


def shifted(name: str, place: int, size: int) -> RoutingCounts:
    """Move selections from the other experts to the first, so that sums over experts stay."""
    counts = random_counts(3)
    array = arrays_of(counts, 0)[name].astype(np.int64)
    row_E = array[place, 0]
    for expert in range(1, len(row_E)):
        moved = min(size, int(row_E[expert]))
        row_E[expert] -= moved
        row_E[0] += moved
        size -= moved
    return changed(counts, 0, **{name: array})


def test_laws_between_cells_can_fail() -> None:
    with pytest.raises(ValueError, match="selections of an expert <= tokens"):
        shifted("expert_BLE", 1, 50).check()
    with pytest.raises(ValueError, match="joint <= occurrences of the marker"):
        shifted("joint_MLE", 1, 50).check()
    counts = random_counts(3)
    total_B = counts.traces[0].total_B
    two_experts = np.zeros((NUM_BINS, 2, 4), np.int64)  # take every selection, and the markers' other experts none
    two_experts[..., :2] = total_B[:, None, None]
    with pytest.raises(ValueError, match="joint <= selections of the expert"):
        changed(counts, 0, expert_BLE=two_experts).check()
    more = changed(counts, 0, marker_MB=np.roll(counts.traces[0].marker_MB * 0 + 0, 1))
    with pytest.raises(ValueError, match="selections at a marker per layer"):
        more.check()
    squeezed = np.zeros_like(counts.traces[0].marker_MB)
    squeezed[:, 0] = counts.traces[0].marker_MB.sum(-1)
    with pytest.raises(ValueError, match="occurrences of a marker <= tokens"):
        changed(counts, 0, marker_MB=squeezed).check()


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
        broken("total_B", (0,), 1).save(tmp_path / "c.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_broken_files_are_refused_in_one_line(tmp_path: Path) -> None:
    counts, path = random_counts(5), tmp_path / "c.safetensors"
    counts.save(path)
    content = path.read_bytes()
    metadata, arrays = read_tensors(path, "np")
    head: dict[str, Any] = json.loads(metadata["routing_counts"])
    cases: dict[str, Any] = {
        "is not a whole safetensors file": lambda: path.write_bytes(content[:-8]),
        "is not a whole safetensors file ": lambda: path.write_bytes(b"{}"),
        "and no routing counts": lambda: save_file({"weight": np.zeros(3)}, path),
        "its version is 9, this program reads version 2": lambda: save_file(
            arrays, path, {"routing_counts": json.dumps({**head, "version": 9})}
        ),
        "cannot be used: .*unexpected keyword": lambda: save_file(
            arrays, path, {"routing_counts": json.dumps({**head, "signature": {**head["signature"], "x": 1}})}
        ),
        "cannot be used: the counts break the law": lambda: save_file(
            {**arrays, "total_NB": arrays["total_NB"] + 1}, path, {"routing_counts": json.dumps(head)}
        ),
        "cannot be used: ends_N is int64 .3,.: expected int64 for 4 traces": lambda: save_file(
            {**arrays, "ends_N": arrays["ends_N"][1:]}, path, {"routing_counts": json.dumps(head)}
        ),
        "its packed counts do not end where the last trace does": lambda: save_file(
            {**arrays, "packed": arrays["packed"][:-1]}, path, {"routing_counts": json.dumps(head)}
        ),
        "cannot be used: the counts of trace '5-0#0' are damaged": lambda: save_file(
            {**arrays, "packed": arrays["packed"][::-1].copy()}, path, {"routing_counts": json.dumps(head)}
        ),
        "there is no counts file": path.unlink,
    }
    for message, spoil in cases.items():
        spoil()
        with pytest.raises(ValueError, match=message) as caught:
            RoutingCounts.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def old_file(path: Path, counts: RoutingCounts, num_groups: int = 16) -> None:
    """As version 1 wrote them."""
    head = {"version": 1, "signature": counts.signature.to_dict(), "versions": {"torch": ["2.0"]}}
    save_file(counts.grouped(num_groups), path, {"routing_counts": json.dumps(head)})


def test_files_of_version_1_are_still_read_and_say_what_they_cannot_answer(tmp_path: Path) -> None:
    counts, path = random_counts(5, num_problems=30), tmp_path / "old.safetensors"
    old_file(path, counts)
    old = RoutingCounts.load(path)
    for name, array in counts.grouped().items():
        np.testing.assert_array_equal(old.grouped()[name], array)
    assert (old.num_traces, old.num_tokens) == (30, counts.num_tokens)
    assert "counts of version 1 keep groups of traces: the robust test" in old.cannot_answer
    assert "\n" not in old.cannot_answer
    assert counts.cannot_answer == ""
    old.save(tmp_path / "new.safetensors")
    assert RoutingCounts.load(tmp_path / "new.safetensors") == old
    assert "collect them again" in (old + random_counts(6)).cannot_answer
    with pytest.raises(ValueError, match="is there twice"):
        _ = old + RoutingCounts.load(path)


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


@pytest.mark.parametrize("layers", [[0, 0], [1, 0], [0, 9]])
def test_layers_of_no_model_are_refused(layers: list[int], tmp_path: Path) -> None:
    counts, path = random_counts(1), tmp_path / "counts.safetensors"
    counts.save(path)
    with safe_open(path, "np") as file:
        head = json.loads(file.metadata()["routing_counts"])
    head["signature"]["model"]["moe_layers"] = layers
    save_file(load_file(path), path, {"routing_counts": json.dumps(head)})
    with pytest.raises(
        ValueError, match=r"counts\.safetensors .*moe_layers is \[.*\]: ascending layers of a model of 3"
    ):
        RoutingCounts.load(path)
