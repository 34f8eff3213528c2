import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.core.problem_sets import PARTS, ProblemSets, cut, problem_sets, refuse_overlap
from launch.jobs.experts_options import Options
from reasoning_evals import Problem
from reasoning_evals.problems import write_problems


def problem(name: str, cluster: str | None = None) -> Problem:
    return Problem(name, f"What is {name}?", "1", "integer", cluster_id=cluster)


@settings(deadline=None, max_examples=50)
@given(
    clusters=st.lists(st.sampled_from([None, "a", "b", "c", "d"]), min_size=8, max_size=40),
    seed=st.integers(0, 5),
)
def test_the_parts_are_disjoint_and_whole_and_keep_clusters_together(clusters: list[str | None], seed: int) -> None:
    problems = [problem(f"p{i}", cluster) for i, cluster in enumerate(clusters)]
    parts = cut(problems, seed)
    refuse_overlap(ProblemSets(*(parts[part] for part in PARTS)))
    assert sorted(p.problem_id for part in parts.values() for p in part) == sorted(p.problem_id for p in problems)
    homes = {(p.cluster_id, part) for part, members in parts.items() for p in members if p.cluster_id}
    assert len(homes) == len({cluster for cluster, _ in homes})
    assert cut(list(reversed(problems)), seed) == parts, "the order of the file does not matter"


def test_the_lab_sets_do_not_overlap() -> None:
    sets = problem_sets(Options(quick=True))
    assert [len(part) for part in sets] == [48, 12, 32]


def test_overlap_is_refused() -> None:
    with pytest.raises(ValueError, match="problem 'x' is in the identification and in the test set"):
        refuse_overlap(ProblemSets([problem("x")], [], [problem("x")]))
    twin = Problem("y", "What is x?", "1", "integer")
    with pytest.raises(ValueError, match="keep them apart"):
        refuse_overlap(ProblemSets([], [problem("x")], [twin]))


def test_a_file_is_cut_and_with_a_plan_it_is_all_test(tmp_path) -> None:
    write_problems(tmp_path / "p.jsonl", [problem(f"p{i}") for i in range(20)])
    sets = problem_sets(Options(problems=str(tmp_path / "p.jsonl")))
    assert [len(part) for part in sets] == [5, 5, 10]
    sets = problem_sets(Options(problems=str(tmp_path / "p.jsonl"), preset="rice-r1-math", num_test=7))
    assert [len(part) for part in sets] == [0, 0, 7]


@pytest.mark.parametrize(("part", "held"), [("identification", 5), ("tuning", 5), ("test", 10)])
def test_no_set_is_smaller_than_it_was_asked_for(tmp_path, part: str, held: int) -> None:
    write_problems(tmp_path / "p.jsonl", [problem(f"p{i}") for i in range(20)])
    for asked in (2, held):
        sets = problem_sets(Options(problems=str(tmp_path / "p.jsonl"), **{f"num_{part}": asked}))
        assert len(getattr(sets, part)) == asked
    with pytest.raises(ValueError, match=rf"leaves {held} {part} problems, {held + 1} were asked for.*--num-{part}$"):
        problem_sets(Options(problems=str(tmp_path / "p.jsonl"), **{f"num_{part}": held + 1}))
    assert (
        len(problem_sets(Options(problems=str(tmp_path / "p.jsonl"), quick=True)).test) == 10
    )  # no number was asked for


def test_too_few_problems(tmp_path) -> None:
    write_problems(tmp_path / "p.jsonl", [problem("only")])
    with pytest.raises(ValueError, match="leaves no identification problems: give more problems$"):
        problem_sets(Options(problems=str(tmp_path / "p.jsonl")))
