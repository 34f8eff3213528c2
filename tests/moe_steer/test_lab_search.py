"""The lab whose thinking pays: its problems, the solutions it learned from, its training in small, and the shipped checkpoint."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from statistics import fmean

import pytest
from transformers import AutoTokenizer

from launch.cli.main import main
from launch.lab import batches as batches_module
from launch.lab.batches import corpus, search_text
from launch.lab.card import count_parameters
from launch.lab.models import train_tokenizer
from launch.lab.scoring import ROUTER_KEYS, export_model, is_correct
from launch.lab.solutions import AGAIN, MAX_SECOND_LOOKS, SEEKERS, compared, draw_seeker, write_search
from launch.lab.train import Recipe, train
from launch.lab.train_search import BARE_LAB, BARE_RECIPE, SEARCH_LAB
from moe_steer.lab import LAB_SEARCH
from moe_steer.lab.family import Scratch
from moe_steer.lab.problems import (
    FAMILIES,
    SEARCH_FAMILIES,
    SPLITS,
    draw_params,
    generate_problems,
    make_problem,
    search_task,
)
from reasoning_evals import load_task
from reasoning_evals.runs import read_generations, read_grades

FITS = {
    "which_summand": lambda given, goal, x: x == goal - given,
    "which_minuend": lambda given, goal, x: x == goal + given,
    "which_with_digits": lambda _, goal, x: x + sum(map(int, str(x))) == goal,
    "which_square": lambda given, goal, x: sum(x for _ in range(x)) == goal - given,
    "which_resistor": lambda given, goal, x: goal - x == given,
    "which_temperature": lambda given, goal, x: x - goal == given,
    "which_mass": lambda given, goal, x: goal / x == given,
    "which_speed": lambda given, goal, x: 0.5 * 2 * x * x + given == goal,
}
QUICK, PERSISTENT = 0.6, 0.04


def looks(text: str) -> int:
    """Second looks at a success."""
    return text.count(f"{AGAIN}:")


def test_exactly_one_candidate_fits_by_another_formula_and_it_is_the_target() -> None:
    assert set(FITS) == set(SEARCH_FAMILIES)
    assert not set(SEARCH_FAMILIES) & set(FAMILIES)
    for name, family in SEARCH_FAMILIES.items():
        rng = random.Random(name)
        for split in SPLITS:
            for _ in range(40):
                given, goal, *candidates = params = draw_params(family, split, rng)
                problem = make_problem(family, params)
                assert [x for x in candidates if FITS[name](given, goal, x)] == [int(problem.target)]
                assert len(set(candidates)) == 6
                for text in family.wordings(params):
                    assert f"{', '.join(map(str, candidates[:-1]))} or {candidates[-1]}" in text
                    assert str(goal) in text
                sheet = Scratch()
                assert family.solve(sheet, params) == int(problem.target)
                tried = candidates[: candidates.index(int(problem.target)) + 1]
                assert [family.attempt(Scratch(), given, x) == goal for x in tried] == [False] * (len(tried) - 1) + [
                    True
                ]


def test_the_right_candidate_stands_anywhere() -> None:
    rng, places = random.Random(0), [0] * 6
    for _ in range(600):
        family = SEARCH_FAMILIES[rng.choice(sorted(SEARCH_FAMILIES))]
        params = draw_params(family, "train", rng)
        places[params[2:].index(int(family.answer(params)))] += 1
    assert min(places) > 60


def test_splits_share_no_problem_and_have_both_domains() -> None:
    found = {split: generate_problems(split, 160, 3, SEARCH_FAMILIES) for split in SPLITS}
    texts = [problem.prompt for problems in found.values() for problem in problems]
    ids = [problem.problem_id.split("-", 2)[2] for problems in found.values() for problem in problems]
    assert len(set(texts)) == len(texts) == len(set(ids)) == 4 * 160
    domains = [str(problem.domain).split("/")[0] for problem in found["test"]]
    assert (domains.count("maths"), domains.count("physics")) == (80, 80)


def test_the_task_is_an_entry_point() -> None:
    problems = load_task("lab-search", split="tuning", num=16, seed=4)
    assert [problem.target for problem in problems] == [row["target"] for row in search_task("tuning", 16, 4)]
    assert {problem.answer_type for problem in problems} == {"integer", "quantity"}


def test_written_solutions_try_in_order_and_are_graded_right_when_they_end_at_the_right_one() -> None:
    rng = random.Random(1)
    for _ in range(400):
        family = SEARCH_FAMILIES[rng.choice(sorted(SEARCH_FAMILIES))]
        params = draw_params(family, "train", rng)
        seeker = draw_seeker(rng)[1]
        text = write_search(family, params, rng, seeker)
        tried = [int(number) for number in re.findall(r"[Tt]ry (\d+):", text)]
        assert tried == list(params[2 : 2 + len(tried)])
        verdicts = re.findall(r"We want (\d+) and get (\d+) \([^)]+\): (right|wrong)\.", text)
        assert all((wanted == found) == (verdict == "right") for wanted, found, verdict in verdicts)
        assert len(verdicts) == len(tried) + looks(text)
        assert looks(text) <= MAX_SECOND_LOOKS
        (final,) = (int(number) for number in re.findall(r"boxed\{(\d+)", text))
        assert is_correct(make_problem(family, params), text) == (final == family.answer(params))
        if verdicts[-1][2] == "right":
            assert final == family.answer(params)
        else:
            assert final not in tried
            assert looks(text) == 0


def test_numbers_are_compared_up_to_the_first_digits_that_differ() -> None:
    for wanted in (*range(1, 130), 144):
        for found in (7, 40, 44, 72, 104, 144):
            pairs = [re.split(" and | ", pair) for pair in compared(wanted, found).split(", ")]
            assert [word for *_, word in pairs[:-1]] == ["right"] * (len(pairs) - 1)
            assert pairs[-1][2] == ("right" if wanted == found else "wrong")
            assert all((left == right) == (word == "right") for left, right, word in pairs)
            for side, number in enumerate((wanted, found)):
                assert str(number).startswith("".join(pair[side] for pair in pairs if pair[side] != "none"))


def test_the_first_stage_has_bare_verdicts_and_few_second_looks() -> None:
    rng = random.Random(4)
    texts = [BARE_LAB.write(rng, BARE_RECIPE.check_rates[0][1])[1] for _ in range(200)]
    assert not any("(" in text for text in texts)
    assert fmean(map(looks, texts)) < 0.3
    assert all("(" in search_text(rng)[1] for _ in range(5))


def test_tempers_differ_in_what_they_do_and_going_on_pays() -> None:
    rng, right = random.Random(2), {}
    for seeker in SEEKERS:
        found = []
        for _ in range(300):
            family = SEARCH_FAMILIES[rng.choice(sorted(SEARCH_FAMILIES))]
            params = draw_params(family, "train", rng)
            text = write_search(family, params, rng, seeker)
            found.append((is_correct(make_problem(family, params), text), looks(text)))
        right[seeker.give_up_rate, seeker.check_rate] = fmean(ok for ok, _ in found)
        checks = fmean(number for ok, number in found if ok)
        assert checks > 0.9 if seeker.check_rate > 0.5 and seeker.give_up_rate < 0.5 else checks < 1.9
    assert min(right[PERSISTENT, 0.8], right[PERSISTENT, 0.1]) > 0.85
    assert max(right[QUICK, 0.8], right[QUICK, 0.1]) < 0.55


def test_zeal_scales_the_second_looks_alone() -> None:
    family, rng = SEARCH_FAMILIES["which_summand"], random.Random(3)
    means = {}
    for zeal in (0.0, 1.0):
        params = [draw_params(family, "train", rng) for _ in range(200)]
        means[zeal] = fmean(looks(write_search(family, one, rng, SEEKERS[0], zeal)) for one in params)
    assert means[0.0] == 0 < 1.2 < means[1.0]


def test_the_training_in_small_gives_a_checkpoint_of_the_same_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches_module, "POOL_SIZE", 8)
    monkeypatch.setattr(batches_module, "BATCH_SIZE", 4)
    monkeypatch.setattr(batches_module, "BATCHES_PER_POOL", 2)
    tokenizer = train_tokenizer(corpus(200, 0, search_text))
    recipe = Recipe(steps=2, warmup_steps=1)
    model = train(recipe, tmp_path / "work", tokenizer, log_every=1, subject=SEARCH_LAB)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "work" / "loss.jsonl").read_text().splitlines()]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    export_model(model, tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    shipped = json.loads((LAB_SEARCH / "config.json").read_text())
    assert {key for key in config if config[key] != shipped.get(key)} <= {"vocab_size", "transformers_version"}


def test_the_shipped_files_are_small_and_whole() -> None:
    assert sum(path.stat().st_size for path in LAB_SEARCH.iterdir()) <= 8_000_000
    config = json.loads((LAB_SEARCH / "config.json").read_text())
    assert config["model_type"] == "deepseek_v3"
    assert config.items() >= ROUTER_KEYS.items()
    card = (LAB_SEARCH / "README.md").read_text()
    for name in (*SEARCH_FAMILIES, "all"):
        assert re.search(rf"^\| {name} \| \d+ \| \d+\.\d% \|", card, re.MULTILINE)
    assert f"{count_parameters(LAB_SEARCH / 'model.safetensors'):,} parameters" in card
    assert "python -m launch.lab.train_search --work DIR" in card
    tokenizer = AutoTokenizer.from_pretrained(LAB_SEARCH)
    for text in corpus(20, 5, search_text):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_a_user_samples_it_on_its_own_problems(tmp_path: Path) -> None:
    """From the command to the grades: thoughts close, and what ends at "right." is graded right, which the model learned to tell."""
    asked = ["generate", "--model", "lab-search", "--num", "24", "--out", str(tmp_path / "run")]
    assert main(asked) == 0
    rows = read_grades(tmp_path / "run")
    assert len(rows) == 24
    assert all(row.problem_id.split("-")[2] in SEARCH_FAMILIES for row in rows)
    assert sum(row.outcome not in ("truncated", "cut") for row in rows) >= 22
    assert 8 <= sum(row.correct for row in rows) <= 20
    texts = {item.problem_id: item.text for item in read_generations(tmp_path / "run")}
    found = [row.correct for row in rows if texts[row.problem_id].partition("</think>")[0].endswith(" right.")]
    assert sum(found) >= len(found) - 1 > 6
