import dataclasses
import gzip
import json
import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from reasoning_evals import Problem, grade, load_task
from reasoning_evals.engines import SamplingConfig
from reasoning_evals.grading import grade_answer
from reasoning_evals.problems import asked_once, write_problems
from reasoning_evals.runs.run import run_arms
from reasoning_evals.tasks import loading, task_names, task_spec
from reasoning_evals.tasks.letters import LETTERS, shuffled
from reasoning_evals.tasks.loading import SPECS
from scripted_sampler import arms

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason=f"the published data are not at {DATA}")

SHORT_ANSWERS = {"mmlu", "safeedit", "real_toxicity"}
"""Data sets that are not asked for a thought; their rows are in test_safety_tasks.py."""
ROWS = {
    "aime2024": {"id": 61, "problem": "Find x.", "answer": "025", "url": "https://x/2024_AIME_I_Problems/Problem_2"},
    "aime2025": {"problem_idx": 3, "problem": "Find x.", "answer": 82},
    "aime2026": {"problem_idx": 3, "problem": "Find x.", "answer": 82},
    "math500": {"problem": "x?", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 2, "unique_id": "test/algebra/1.json"},
    "gsm8k": {"question": "How many?", "answer": "9 * 2 = <<9*2=18>>18\n#### 1,018"},
    "olympiadbench_maths": {"id": 1, "question": "x?", "context": None, "final_answer": ["$2$"], "is_multiple_answer": False,
                            "unit": None, "answer_type": "Numerical", "error": None, "subfield": "Algebra"},
    "olympiadbench_physics": {"id": 2, "question": "v?", "context": "A ball.", "final_answer": ["2.5"], "is_multiple_answer": False,
                              "unit": "m/s", "answer_type": "Numerical", "error": "0.1", "subfield": "Mechanics"},
    "gpqa_diamond": {"Question": "Which?", "Correct Answer": "right", "Incorrect Answer 1": "w1", "Incorrect Answer 2": "w2",
                     "Incorrect Answer 3": "w3", "High-level domain": "Physics", "Subdomain": "Optics", "Record ID": "rec1"},
    "mmlu_pro_physics": {"question_id": 7, "question": "Which?", "options": ["a", "b", "N/A"], "answer": "B", "answer_index": 1,
                         "category": "physics", "src": "x"},
    "scibench": {"problem_text": "How far?", "answer_number": " 2.5", "unit": "$10^6$ m", "source": "fund", "problemid": " 3.01"},
    "ugphysics": {"problem": "v?", "answers": "$2.5$", "answer_type": "NV", "unit": "m/s", "is_multiple_answer": False, "subject": "Mechanics"},
    "phybench": {"id": 3, "tag": "OPTICS", "content": "n?", "solution": "", "answer": "$$\\frac{a}{b}$$"},
    "tpbench": {"problem_id": "slow", "domain": "Cosmology", "problem": "H?", "solution": "", "answer": "$$H_0 t$$"},
    "physics": {"id": "optics/1", "questions": "a) b)", "solutions": "", "final_answers": ["3 \\text{ m}", "x, y"], "graphs": None},
    "theoremqa": {"Question": "x?", "Answer": 1.42, "Answer_type": "float", "Picture": None, "theorem": "limit", "field": "Math", "subfield": "Calculus"},
}  # fmt: skip
EXPECTED = {
    "aime2024": ("aime2024-61", "25", "integer", None),
    "aime2025": ("aime2025-3", "82", "integer", None),
    "aime2026": ("aime2026-3", "82", "integer", None),
    "math500": ("math500-test/algebra/1.json", "\\frac{1}{2}", "expression", None),
    "gsm8k": ("gsm8k-ba352e24c6", "1018", "integer", None),
    "olympiadbench_maths": ("olympiadbench-1", "2", "expression", None),
    "olympiadbench_physics": ("olympiadbench-2", "2.5", "quantity", "m/s"),
    "gpqa_diamond": ("gpqa-rec1", None, "choice", None),
    "mmlu_pro_physics": ("mmlu_pro-7", "B", "choice", None),
    "scibench": ("scibench-fund-3.01", "2.5", "quantity", "10^6$ m"),
    "ugphysics": (None, "2.5", "quantity", "m/s"),
    "phybench": ("phybench-3", "\\frac{a}{b}", "expression", None),
    "tpbench": ("tpbench-slow", "H_0 t", "expression", None),
    "physics": ("physics-optics/1", "{3 \\text{ m}; x, y}", "list", None),
    "theoremqa": (None, "1.42", "number", None),
}


def write_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_every_data_set_becomes_a_problem(name, tmp_path):
    (problem,) = load_task(name, data_dir=write_rows(tmp_path / "rows.jsonl.gz", [ROWS[name]]))
    problem_id, target, answer_type, unit = EXPECTED[name]
    assert problem.problem_id == (problem_id or problem.problem_id)
    assert problem.target == (target or problem.target)
    assert (problem.answer_type, problem.unit) == (answer_type, unit)
    assert "\\boxed{}" in problem.prompt
    assert "step by step" in problem.prompt
    assert problem.domain
    graded = grade(problem, f"<think>x</think>\\boxed{{{problem.target}}}")
    assert graded.outcome == "correct", graded


@pytest.mark.parametrize("name", ROWS)
def test_an_odd_cell_is_taken_or_refused_with_its_place(name, tmp_path):
    path, refused = tmp_path / "rows.jsonl", []
    for column in ROWS[name]:
        for odd in (None, 5, 2.5, True, "", "x", [], [None], ["a", None], {"a": 1}, [{"a": 1}], 10**30):
            write_rows(path, [{**ROWS[name], column: odd}])
            try:
                load_task(name, data_dir=path)
            except ValueError as error:
                refused.append(str(error))
    assert refused
    assert [text for text in refused if not re.match(r"\S+rows.jsonl:1: .*$|task .*: no row of split .*$", text)] == []


@pytest.mark.parametrize(
    ("name", "cell", "message"),
    [
        ("gsm8k", {"answer": None}, "'answer' is None: give a text"),
        ("gpqa_diamond", {"Incorrect Answer 2": None}, "'Incorrect Answer 2' is None: give a text"),
        ("gpqa_diamond", {"Incorrect Answer 2": " "}, "an answer of question 'rec1' is empty"),
        ("olympiadbench_maths", {"final_answer": "42"}, "'final_answer' is '42': give a list"),
        ("olympiadbench_maths", {"id": None}, "'id' is None: give a text or a whole number"),
        ("mmlu_pro_physics", {"answer": "C"}, "answer is 'C': expected one of A, B"),
        ("mmlu_pro_physics", {"options": "['a', 'b']"}, "'options' is .*: give a list"),
    ],
)
def test_cells_that_would_make_another_problem_are_refused(name, cell, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_task(name, data_dir=write_rows(tmp_path / "rows.jsonl", [{**ROWS[name], **cell}]))


def test_every_table_entry_is_complete():
    families = {spec.family for spec in SPECS.values()}
    assert families == {task_spec(name).family for name in ROWS} | SHORT_ANSWERS
    for name, spec in SPECS.items():
        assert spec.name == name
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", spec.hub_id)
        assert spec.revision is None or re.fullmatch(r"[0-9a-f]{40}", spec.revision)
        assert spec.k >= 1
        assert spec.licence
        assert "{problem}" in spec.prompt
        rule = (0.0, 1.0) if spec.family in SHORT_ANSWERS else (0.6, 0.95)
        assert (spec.sampling.temperature, spec.sampling.top_p) == rule
    assert not task_spec("gpqa_diamond").publish_items
    with pytest.raises(ValueError, match="unknown data set 'lab': expected one of aime2024"):
        task_spec("lab")


@needs_data
@pytest.mark.parametrize(
    ("name", "count"), [("gsm8k", 1319), ("theoremqa", 747), ("theoremqa_physics", 114), ("theoremqa_maths", 424)]
)
def test_published_files_load_and_their_own_answers_are_right(name, count):
    problems = load_task(name, data_dir=DATA)
    assert len(problems) == len({problem.problem_id for problem in problems}) == count
    for problem in problems:
        assert grade_answer(problem, problem.target).outcome == "correct", problem
        if problem.answer_type == "integer":
            assert grade_answer(problem, str(int(problem.target) + 1)).outcome == "wrong"


@needs_data
def test_answer_types_of_theoremqa():
    problems = load_task("theoremqa", data_dir=DATA / "theoremqa")
    kinds = {
        kind: sum(problem.answer_type == kind for problem in problems)
        for kind in ("integer", "number", "choice", "list")
    }
    assert kinds == {"integer": 200, "number": 360, "choice": 128, "list": 59}
    truth = next(problem for problem in problems if problem.target == "True")
    assert "True or False" in truth.prompt
    assert all(problem.tolerance == 0.04 for problem in problems if problem.answer_type == "number")


@needs_data
def test_drawing_depends_on_seed_and_ids_alone(tmp_path):
    everything = load_task("gsm8k", data_dir=DATA)
    drawn = load_task("gsm8k", data_dir=DATA, num=50, seed=3)
    assert drawn == load_task("gsm8k", data_dir=DATA / "gsm8k" / "test.jsonl.gz", num=50, seed=3)
    assert [problem for problem in everything if problem in drawn] == drawn
    assert drawn != load_task("gsm8k", data_dir=DATA, num=50, seed=4)
    write_problems(tmp_path / "turned.jsonl", everything[::-1])
    turned = load_task(str(tmp_path / "turned.jsonl"), num=50, seed=3)
    assert {problem.problem_id for problem in turned} == {problem.problem_id for problem in drawn}
    with pytest.raises(ValueError, match="task 'gsm8k' has 1319 problems, 5000 were asked for"):
        load_task("gsm8k", data_dir=DATA, num=5000)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("aime24", {}, "unknown task 'aime24': expected one of aime2024, aime2025"),
        ("gsm8k", {"num": 0}, "num is 0: expected 1 or more"),
        ("gsm8k", {"shots": 5}, "task 'gsm8k' has no option shots: it takes config, overrides, prompt, revision"),
        ("gsm8k", {"data_dir": "/nowhere/at/all"}, "data_dir /nowhere/at/all does not exist"),
        ("gsm8k", {"prompt": "Say it."}, "expected a template with {problem} in it"),
        ("scibench", {}, "no commit of xw27/scibench is on record, give revision="),
        ("problems.jsonl", {}, "problems.jsonl does not exist: give a file of problems, or the name of a task"),
        ("problems.jsonl", {"revision": "x"}, "has no option revision: it takes answer_type, columns"),
        ("reasoning_gym", {"dataset": "coin_flip"}, "reasoning_gym dataset is 'coin_flip': expected one of basic_arithmetic"),
    ],
)  # fmt: skip
def test_wrong_calls_are_refused_in_one_line(name, options, message, tmp_path):
    if "prompt" in options:
        options["data_dir"] = write_rows(tmp_path / "test.jsonl", [ROWS["gsm8k"]])
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        load_task(name, **options)
    assert message in str(error.value)


def test_a_file_of_another_data_set_is_refused(tmp_path):
    path = write_rows(tmp_path / "test.jsonl", [ROWS["math500"]])
    with pytest.raises(
        ValueError, match=r"test\.jsonl:1: task 'gsm8k' needs the column question, the row has problem, answer"
    ):
        load_task("gsm8k", data_dir=path)
    bad = write_rows(tmp_path / "bad.jsonl", [{"question": "x?", "answer": "18"}])
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: answer has no '####': '18'"):
        load_task("gsm8k", data_dir=bad)


def test_the_right_file_of_a_folder_is_found(tmp_path):
    write_rows(tmp_path / "train.jsonl", [ROWS["gsm8k"]] * 2)
    write_rows(tmp_path / "test.jsonl", [ROWS["gsm8k"]])
    (tmp_path / "LICENSE").write_text("MIT")
    assert len(load_task("gsm8k", data_dir=tmp_path)) == 1
    assert [problem.problem_id for problem in load_task("gsm8k", data_dir=tmp_path, split="train")] == [
        "gsm8k-ba352e24c6", "gsm8k-ba352e24c6-2",
    ]  # fmt: skip
    write_rows(tmp_path / "test-2.jsonl", [ROWS["gsm8k"]])
    with pytest.raises(ValueError, match=r"holds 2 files that may be split 'test' \(test-2.jsonl, test.jsonl\)"):
        load_task("gsm8k", data_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data file"):
        load_task("gsm8k", data_dir=tmp_path / "empty")


def test_json_and_csv_are_read(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([ROWS["gsm8k"]]))
    (tmp_path / "b.csv").write_text('question,answer\nHow many?,"9\n#### 18"\n')
    assert load_task("gsm8k", data_dir=tmp_path / "a.json")[0].target == "1018"
    assert load_task("gsm8k", data_dir=tmp_path / "b.csv")[0].target == "18"
    (tmp_path / "c.json").write_text('{"question": "x"}')
    with pytest.raises(ValueError, match=r"c\.json: expected a JSON list of objects, got dict"):
        load_task("gsm8k", data_dir=tmp_path / "c.json")


def test_parquet_is_read(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    import pyarrow

    for shard in range(2):
        row = {"question": f"How many {shard}?", "answer": f"#### {shard}"}
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"test-0000{shard}-of-00002.parquet")
    assert [problem.target for problem in load_task("gsm8k", data_dir=tmp_path)] == ["0", "1"]


def test_the_order_of_options_belongs_to_the_item(tmp_path):
    rows = [
        {**ROWS["gpqa_diamond"], "Record ID": f"rec{number}", "Question": f"Which {number}?"} for number in range(200)
    ]
    problems = load_task("gpqa_diamond", data_dir=write_rows(tmp_path / "diamond.jsonl", rows))
    for problem in problems:
        assert f"({problem.target}) right" in problem.prompt
    shares = [sum(problem.target == letter for problem in problems) / 200 for letter in "ABCD"]
    assert all(0.12 < share < 0.4 for share in shares)
    turned = load_task("gpqa_diamond", data_dir=write_rows(tmp_path / "turned.jsonl", rows[::-1]))
    assert turned == problems[::-1]
    assert shuffled("rec1", "abcd") == shuffled("rec1", "wxyz") == [2, 3, 1, 0]
    assert len(LETTERS) == 10


def test_parts_of_a_data_set_hold_only_their_rows(tmp_path):
    rows = [
        {**ROWS["gpqa_diamond"], "High-level domain": domain, "Record ID": domain} for domain in ("Physics", "Biology")
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert [problem.problem_id for problem in load_task("gpqa_diamond_biology", data_dir=path)] == ["gpqa-Biology"]
    with pytest.raises(ValueError, match="no row of split 'train' is a problem of it"):
        load_task("gpqa_diamond_chemistry", data_dir=path)


def test_details_of_some_data_sets(tmp_path):
    several = {**ROWS["olympiadbench_maths"], "final_answer": ["$1$", "$-2$"], "is_multiple_answer": True}
    (problem,) = load_task("olympiadbench_maths", data_dir=write_rows(tmp_path / "several.jsonl", [several]))
    assert (problem.target, problem.answer_type) == ("{1; -2}", "list")
    (problem,) = load_task(
        "olympiadbench_physics", data_dir=write_rows(tmp_path / "p.jsonl", [ROWS["olympiadbench_physics"]])
    )
    assert problem.tolerance == pytest.approx(0.1 / 2.5)
    assert problem.prompt.startswith("A ball.\n\nv?")
    (problem,) = load_task("scibench", data_dir=write_rows(tmp_path / "s.jsonl", [ROWS["scibench"]]))
    assert "in 10^6$ m," in problem.prompt
    rows = [{**ROWS["phybench"], "answer": None}, ROWS["phybench"]]
    assert len(load_task("phybench", data_dir=write_rows(tmp_path / "b.jsonl", rows))) == 1
    (problem,) = load_task("aime2024", data_dir=write_rows(tmp_path / "a.jsonl", [ROWS["aime2024"]]))
    assert problem.cluster_id == "aime2024-I"


def test_own_columns(tmp_path):
    path = write_rows(
        tmp_path / "mine.jsonl", [{"q": "2+2?", "a": 4, "note": "easy"}, {"q": "3+3?", "a": 6, "note": ""}]
    )
    problems = load_task(
        str(path),
        columns={"prompt": "q", "target": "a"},
        answer_type="integer",
        prompt="{problem} Answer in a \\boxed{{}}.",
    )
    assert problems[0] == Problem("mine-0", "2+2? Answer in a \\boxed{}.", "4", "integer")
    with pytest.raises(ValueError, match=r"mine\.jsonl:1: no column b; the row has q, a, note"):
        load_task(str(path), columns={"prompt": "q", "target": "b"}, answer_type="integer")
    with pytest.raises(ValueError, match="columns names question: a problem has the fields problem_id, prompt"):
        load_task(str(path), columns={"question": "q"})
    with pytest.raises(ValueError, match="unknown column 'a', unknown column 'note', unknown column 'q'"):
        load_task(str(path))


def test_published_errors_can_be_corrected(tmp_path):
    path = write_rows(tmp_path / "test.jsonl", [ROWS["gsm8k"]])
    (problem,) = load_task("gsm8k", data_dir=path, overrides={"gsm8k-ba352e24c6": 19})
    assert problem.target == "19"
    with pytest.raises(ValueError, match="task 'gsm8k': overrides names gsm8k-x, which is not one of its problems"):
        load_task("gsm8k", data_dir=path, overrides={"gsm8k-x": 19})
    own = tmp_path / "own.jsonl"
    write_problems(own, [problem])
    assert load_task(str(own), overrides={problem.problem_id: "20"})[0].target == "20"


def sample_task(num: int = 2, seed: int = 0):
    """What another package may offer."""
    return [
        {"problem_id": f"s{seed}-{number}", "prompt": "?", "target": number, "answer_type": "integer"}
        for number in range(num)
    ]


@pytest.fixture
def offered(monkeypatch):
    point = EntryPoint("sample", f"{__name__}:sample_task", loading.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: sample_task)
    monkeypatch.setattr(loading, "entry_points", lambda group: [point])


@pytest.mark.usefixtures("offered")
def test_tasks_of_other_packages():
    assert "sample" in task_names()
    assert [problem.problem_id for problem in load_task("sample", num=3, seed=5)] == ["s5-0", "s5-1", "s5-2"]
    assert len(load_task("sample")) == 2
    with pytest.raises(ValueError, match="task 'sample' has no option level: it takes num, seed"):
        load_task("sample", level=3)
    with pytest.raises(ValueError, match="task 'sample' has no option split"):
        load_task("sample", split="test")


def test_the_lab_task_where_it_is_installed():
    if "lab" not in task_names():
        pytest.skip("the package that offers the task is not installed")
    problems = load_task("lab", split="tuning", num=12, seed=1)
    assert len(problems) == 12
    for problem in problems:
        written = f"{problem.target} {problem.unit or ''}".strip()
        assert grade(problem, f"so</think>\\boxed{{{written}}}", opened=True).outcome == "correct", problem


def test_reasoning_gym_says_what_it_needs():
    try:
        import reasoning_gym  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="pip install reasoning-gym"):
            load_task("reasoning_gym", dataset="gcd")
        return
    for dataset in loading.GYM_TYPES:
        problems = load_task("reasoning_gym", dataset=dataset, num=20, seed=2)
        assert problems == load_task("reasoning_gym", dataset=dataset, num=20, seed=2)
        for problem in problems:
            assert grade_answer(problem, problem.target).outcome == "correct", problem


def test_one_question_under_two_ids_is_no_second_problem(tmp_path):
    rows = [
        {"problem_id": name, "prompt": text, "target": "1", "answer_type": "integer", "cluster_id": cluster}
        for name, text, cluster in (
            ("a", "What is 1?", None), ("b", "What is 2?", None), ("c", "What  is 1?\n", None),
            ("d", "What is 3?", None), ("e", "What is 3?", "paper"), ("f", "What is 4?", "paper"),
            ("g", "What is 5?", "x"), ("h", "What is 5?", "y"), ("i", "What is 6?", "y"),
        )
    ]  # fmt: skip
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {problem.problem_id: problem.cluster_id for problem in load_task(str(tmp_path / "twice.jsonl"))}
    assert found == {"a": "a", "b": None, "c": "a", **dict.fromkeys("def", "paper"), **dict.fromkeys("ghi", "x")}


def test_a_run_of_a_version_that_gave_these_no_cluster_goes_on(tmp_path):
    alone = [Problem(name, "what is 1?", "1", "integer") for name in "ab"] + [
        Problem("c", "what is 2?", "2", "integer")
    ]
    sampling = SamplingConfig(max_new_tokens=40)
    assert run_arms(arms()[:1], alone, tmp_path, 2, sampling, 0, task="t").num_new == 6
    assert run_arms(arms()[:1], asked_once(alone), tmp_path, 2, sampling, 0, task="t").num_new == 0
    other = [dataclasses.replace(alone[0], cluster_id="mine"), *alone[1:]]
    with pytest.raises(ValueError, match="another config .problems"):
        run_arms(arms()[:1], other, tmp_path, 2, sampling, 0, task="t")
