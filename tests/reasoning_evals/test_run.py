from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from pathlib import Path

import pytest

from rank_processes import RunningRanks
from reasoning_evals.engines.in_process import InProcessSampler
from reasoning_evals.engines.sampling import Sample, SamplingConfig
from reasoning_evals.runs.audits import gates_text, read_audit, read_gates
from reasoning_evals.runs.chunks import sample_seed
from reasoning_evals.runs.run import Arm, run_arms
from reasoning_evals.runs.run_folder import read_generations, read_run
from scripted_sampler import ScriptedSampler, arms, audited, problems
from tiny_reasoners import tiny_model, tiny_tokenizer

HERE = Path(__file__).parent
CONFIG = SamplingConfig(batch_size=8)


def run(folder: Path, rank: int = 0, world_size: int = 1, **changes: object) -> None:
    values = {"arms": arms(gated=True), "problems": problems(12), "k": 3, "config": CONFIG, "seed": 7, "task": "demo"}
    run_arms(out_dir=folder, rank=rank, world_size=world_size, **{**values, "check_repeats": True, **changes})  # type: ignore[arg-type]


def content(folder: Path) -> list[str]:
    return sorted(completion.to_json() for completion in read_generations(folder))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder)
    return folder


def test_every_sample_once_with_the_same_seed_in_every_arm(unbroken: Path) -> None:
    completions = list(read_generations(unbroken))
    assert Counter((c.arm, c.problem_id, c.sample_idx) for c in completions) == Counter(
        (arm, f"p{i}", j) for arm in ("baseline", "steered") for i in range(12) for j in range(3)
    )
    seeds = {(c.problem_id, c.sample_idx): set[int]() for c in completions}
    for c in completions:
        seeds[c.problem_id, c.sample_idx].add(c.seed)
        assert c.seed == sample_seed(7, "demo", c.problem_id, c.sample_idx) < 2**53
    assert all(len(values) == 1 for values in seeds.values())
    assert len(set.union(*seeds.values())) == 36


def test_an_arm_is_described_by_whole_numbers_too(tmp_path: Path) -> None:
    """JSON has texts as keys, which sort otherwise: "10" before "9"."""
    described = [Arm("biased", ScriptedSampler(), details={"bias": {9: 1.0, 10: 2.0}})]
    run(tmp_path, arms=described)
    before = content(tmp_path)
    assert len(before) == 36
    run(tmp_path, arms=described)
    assert content(tmp_path) == before


@pytest.mark.parametrize(("num", "batch", "batches"), [(12, 8, 1), (24, 4, 2), (40, 2, 4), (60, 2, 4)])
def test_chunks_hold_several_batches_where_enough_are_left_for_the_ranks(
    tmp_path: Path, num: int, batch: int, batches: int
) -> None:
    sampler = ScriptedSampler()
    for rank in range(3):
        changes = {"problems": problems(num), "config": SamplingConfig(batch_size=batch), "arms": [Arm("a", sampler)]}
        run(tmp_path, rank, 3, **changes)
    sizes = [len(keys) for keys in sampler.batches]
    assert max(sizes) == batch * batches
    assert sum(sizes) == 3 * num
    assert len(sizes) - sizes.count(max(sizes)) <= 1
    assert batches == 1 or len(sizes) >= 8
    if batches > 1:  # a chunk is cut: it is sampled again as a whole, and comes out the same
        before = content(tmp_path)
        path = tmp_path / "generations.rank1.jsonl"
        path.write_bytes(path.read_bytes()[:-900])
        sampler.batches.clear()
        run(tmp_path, 1, 3, **changes)
        assert content(tmp_path) == before
        assert {len(keys) for keys in sampler.batches} <= {max(sizes), 3 * num % max(sizes)}


def test_a_finished_run_samples_nothing(unbroken: Path) -> None:
    before = (unbroken / "generations.jsonl").read_bytes()
    sampler = ScriptedSampler(0.5)
    run(unbroken, arms=[Arm("baseline", sampler), arms()[1]])
    assert sampler.batches == []
    assert (unbroken / "generations.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", [1, 30, 500, 4_000, 12_000])
def test_a_cut_run_is_completed_to_the_same_bytes(unbroken: Path, tmp_path: Path, cut: int) -> None:
    run(tmp_path)
    whole = (tmp_path / "generations.jsonl").read_bytes()
    assert whole == (unbroken / "generations.jsonl").read_bytes()
    (tmp_path / "generations.jsonl").write_bytes(whole[:-cut])
    run(tmp_path)
    assert (tmp_path / "generations.jsonl").read_bytes() == whole


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_the_number_of_ranks_changes_nothing(unbroken: Path, tmp_path: Path, world_size: int) -> None:
    for rank in reversed(range(world_size)):
        run(tmp_path, rank, world_size)
    assert content(tmp_path) == content(unbroken)
    assert read_audit(tmp_path).rows == read_audit(unbroken).rows
    assert read_audit(tmp_path).gates == read_audit(unbroken).gates


def test_a_run_goes_on_with_another_number_of_ranks(unbroken: Path, tmp_path: Path) -> None:
    run(tmp_path, 0, 3)
    path = tmp_path / "generations.rank0.jsonl"
    path.write_bytes(path.read_bytes()[:-700])
    run(tmp_path, 1, 2)
    run(tmp_path)
    assert content(tmp_path) == content(unbroken)
    assert read_audit(tmp_path).rows == read_audit(unbroken).rows
    assert read_audit(tmp_path).gates == read_audit(unbroken).gates


def is_running(ranks: RunningRanks) -> bool:
    """Whether the one rank has not ended."""
    try:
        os.kill(ranks.pids[0], 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_kill_9_at_random_moments_then_resume(unbroken: Path, tmp_path: Path, world_size: int) -> None:
    dice = random.Random(world_size)
    kills, tries = 0, 4 // world_size
    for rank in range(world_size):
        for attempt in range(30):
            # Later attempts are quicker, so that the loop ends; the content does not depend on the speed.
            more = [str(tmp_path), str(rank), str(world_size), "0.03" if attempt < tries else "0"]
            path = tmp_path / ("generations.jsonl" if world_size == 1 else f"generations.rank{rank}.jsonl")
            before = path.stat().st_size if path.exists() else 0
            running = RunningRanks(HERE / "scripted_sampler.py", 1, more)
            while attempt < tries and is_running(running) and not (path.exists() and path.stat().st_size > before):
                time.sleep(0.005)
            if attempt < tries:
                time.sleep(dice.random() * 0.25)
                done = running.kill()
            else:
                done = running.wait(60)
            if done.codes == [0]:
                break
            kills += 1
        assert done.codes == [0], done.text
    assert kills >= 2
    assert content(tmp_path) == content(unbroken)
    assert read_audit(tmp_path).rows == read_audit(unbroken).rows
    assert read_audit(tmp_path).gates == read_audit(unbroken).gates
    if world_size == 1:
        assert (tmp_path / "generations.jsonl").read_bytes() == (unbroken / "generations.jsonl").read_bytes()


def test_the_audit_is_added_up_over_chunks_and_a_repeated_chunk_counts_once(unbroken: Path, tmp_path: Path) -> None:
    # 36 samples in chunks of 8 are 5 chunks, 3 tokens each.
    row = {"kind": "expert", "layer": 1, "expert": 2, "gain": 64.0, "when": "x >= 1", "tokens": 15, "weight_added": 7.5}
    assert read_audit(unbroken).rows == {"steered": [row]}
    run(tmp_path)
    path = tmp_path / "generations.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    run(tmp_path)
    assert len((tmp_path / "audit.jsonl").read_text().splitlines()) == 6
    assert read_audit(tmp_path).rows == {"steered": [row]}


def test_what_gates_did_is_kept_of_every_sample_once(unbroken: Path, tmp_path: Path) -> None:
    found = read_gates(unbroken)
    assert sorted(found) == [("steered", f"p{i}", j) for i in sorted(range(12), key=str) for j in range(3)]
    about = {"kind": "expert", "layer": 1, "expert": 2, "when": "x >= 1"}
    for (_, problem, sample), acts in found.items():
        openings = int(problem[1:]) + sample
        assert acts == [{**about, "openings": openings, "open_tokens": 3, "tokens": 2, "weight_added": 0.5}]
    row = {**about, "openings": 2, "open_tokens": 3, "tokens": 1, "weight_added": 0.5}
    said = "layer 1 expert 2: gate opened 2 times, open at 3 tokens, acted at 1, weight 0.5 added"
    assert gates_text([row, row]) == f"{said}; {said}"
    lines = (unbroken / "audit.jsonl").read_text()
    for old, new, message in (
        ('"open_tokens":3', '"open_tokens":"3"', "give a whole number"),
        ('"row":0', '"row":7', "has a gate .*one has row"),
        ('"when":', '"what":', "which names no gated entry"),
        ('"tokens":2,"weight_added"', '"tokens":2,"norm"', "has a gate .*weight_added or norm_added"),
        ('"sample_idx":0', '"sample_idx":0,"more":1', "has a sample .*one has problem_id"),
        ('"samples":', '"sample":', "an object with arm, chunk, rows is expected, and samples"),
    ):
        (tmp_path / "audit.jsonl").write_text(lines.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            read_audit(tmp_path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"config": SamplingConfig(batch_size=8, temperature=0.8)}, "sampling.temperature: 0.6 there, 0.8 now"),
        ({"k": 4}, "k: 3 there, 4 now"),
        ({"seed": 8}, "seed: 7 there, 8 now"),
        ({"task": "other"}, 'task: "demo" there, "other" now'),
        ({"problems": problems(11)}, "num_problems: 12 there, 11 now"),
        ({"arms": arms()[:1]}, "arms.steered: "),
        (
            {"arms": [arms()[0], Arm("steered", ScriptedSampler(0.8), audited, {"plan": "xyz"})]},
            'plan: "abc" there, "xyz" now',
        ),
        (
            {"arms": [arms()[0], Arm("steered", ScriptedSampler(0.7), audited, {"plan": "abc"})]},
            "skill: 0.8 there, 0.7 now",
        ),
    ],
)
def test_a_folder_of_another_config_is_refused_in_one_line(
    unbroken: Path, changes: dict[str, object], text: str
) -> None:
    before = sorted((path.name, path.read_bytes()) for path in unbroken.iterdir())
    with pytest.raises(ValueError, match="holds a run of another config") as info:
        run(unbroken, **changes)
    assert text in str(info.value)
    assert "\n" not in str(info.value)
    assert sorted((path.name, path.read_bytes()) for path in unbroken.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"k": 0}, "nothing to sample: 2 arms, 12 problems, k = 0"),
        ({"problems": []}, "nothing to sample"),
        ({"arms": []}, "nothing to sample"),
        ({"rank": 2, "world_size": 2}, r"rank must be in 0..1, got 2"),
        ({"arms": [arms()[0], arms()[0]]}, "every arm needs its own name"),
        ({"problems": [*problems(2), *problems(1)]}, "occurs twice"),
    ],
)
def test_wrong_calls_are_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, object], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        run(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_a_damaged_run_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is not JSON"):
        run(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="is not the run.json of an evaluation"):
        run(tmp_path)


def test_generations_without_their_run_file_are_refused(unbroken: Path, tmp_path: Path) -> None:
    (tmp_path / "generations.jsonl").write_bytes((unbroken / "generations.jsonl").read_bytes())
    with pytest.raises(ValueError, match="holds a sample that is not of this run"):
        run(tmp_path, seed=9)


def test_non_determinism_is_a_loud_error(tmp_path: Path) -> None:
    class Moody(ScriptedSampler):
        def sample(self, requests, config):  # type: ignore[no-untyped-def]
            for sample in super().sample(requests, config):
                yield Sample(sample.key, sample.token_ids, sample.text + str(random.random()), sample.finish_reason)

    run(tmp_path, arms=[Arm("baseline", Moody())])
    path = tmp_path / "generations.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match="sampling is not deterministic here: sample"):
        run(tmp_path, arms=[Arm("baseline", Moody())])
    run(tmp_path, arms=[Arm("baseline", Moody())], check_repeats=False)
    assert len(content(tmp_path)) == 36


def test_a_sampler_that_leaves_out_samples_is_an_error(tmp_path: Path) -> None:
    class Lazy(ScriptedSampler):
        def sample(self, requests, config):  # type: ignore[no-untyped-def]
            return super().sample(requests[:-1], config)

    with pytest.raises(RuntimeError, match="the sampler of arm 'baseline' left out 1 of 8 samples"):
        run(tmp_path, arms=[Arm("baseline", Lazy())])


def test_run_file_says_what_the_run_is(unbroken: Path) -> None:
    found = read_run(unbroken)
    assert {"version", "config", "created", "commit", "versions", "hardware"} == set(found)
    assert found["config"]["sampling"] == CONFIG.to_dict()
    assert found["config"]["arms"]["steered"]["details"] == {"plan": "abc"}
    hashes = {c.arm: c.config_hash for c in read_generations(unbroken)}
    assert hashes == {name: arm["config_hash"] for name, arm in found["config"]["arms"].items()}
    prompts = {arm["prompts"] for arm in found["config"]["arms"].values()}
    assert len(prompts) == 1, "both arms see the same prompts, and the file says so"
    assert len((unbroken / "problems.jsonl").read_text().splitlines()) == 12


def test_progress_is_silent_off_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    assert capfd.readouterr() == ("", "")
    run(tmp_path / "shown", progress=True)
    assert "tokens/s" in capfd.readouterr().err


def test_the_in_process_sampler_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v3", seed=1)
    model.generation_config.eos_token_id = [1, 20, 33]
    sampler = InProcessSampler(model, tiny_tokenizer())
    config = SamplingConfig(max_new_tokens=20, batch_size=5)
    run(tmp_path / "a", arms=[Arm("baseline", sampler)], config=config)
    whole = (tmp_path / "a" / "generations.jsonl").read_bytes()
    for cut in (1, 900, len(whole) // 2):
        (tmp_path / "a" / "generations.jsonl").write_bytes(whole[:-cut])
        run(tmp_path / "a", arms=[Arm("baseline", sampler)], config=config)
        assert (tmp_path / "a" / "generations.jsonl").read_bytes() == whole
    for rank in range(2):
        run(tmp_path / "b", rank, 2, arms=[Arm("baseline", sampler)], config=config)
    assert content(tmp_path / "b") == content(tmp_path / "a")
    assert json.loads(whole.splitlines()[0])["arm"] == "baseline"
