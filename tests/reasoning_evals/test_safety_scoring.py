"""Fluency, defence rates and a classifier's verdicts, against hand-computed numbers and naive second opinions."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from graded_rows import row, table
from reasoning_evals import Problem
from reasoning_evals.comparing.comparison import Measure
from reasoning_evals.comparing.statistics import proportion_estimate, wilson_interval
from reasoning_evals.safety import LabelJudge, TextScore, compare_defence, defence_of, n_gram_entropy, text_fluency
from reasoning_evals.safety.defence import mean_of_tasks
from reasoning_evals.safety.labels import load_classifier
from reasoning_evals.thinking import split_thought
from tiny_reasoners import CHARACTERS, SPECIALS, tiny_tokenizer

ASK = Problem("p0", "?", "safe", "label")


def test_the_entropy_of_a_small_text_by_hand() -> None:
    # "a b a b c": pairs ab ba ab bc -> 1/2, 1/4, 1/4: H2 = 1.5 bits; triples aba bab abc: H3 = log2 3.
    expected = (2 / 3 * 1.5 + 4 / 3 * math.log2(3)) / 2
    assert n_gram_entropy(["a", "b", "a", "b", "c"]) == pytest.approx(expected)
    assert text_fluency("a b a b c") == pytest.approx(expected)
    assert n_gram_entropy([]) == n_gram_entropy(["a", "b"]) == n_gram_entropy(["a"] * 50) == 0.0
    assert text_fluency("No, no: I don't.") == n_gram_entropy(["No", ",", "no", ":", "I", "don't", "."])


@given(st.lists(st.sampled_from("abc"), max_size=30))
@settings(deadline=None, max_examples=60)
def test_entropy_as_written_in_the_papers(tokens: list[str]) -> None:
    def entropy(n: int) -> float:
        grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
        shares = [grams.count(gram) / len(grams) for gram in set(grams)]
        return -sum(share * math.log(share) for share in shares) / math.log(2)

    assert n_gram_entropy(tokens) == pytest.approx(sum((2 / 3 * entropy(2), 4 / 3 * entropy(3))) / 2, abs=1e-9)


def test_an_empty_answer_is_half_a_defence_and_shown_apart() -> None:
    rows = table({"vanilla": ["1", "0", "0", "n"], "sta": ["1", "1", "n", "n"]})
    vanilla, sta = defence_of(rows, "vanilla"), defence_of(rows, "sta")
    assert (vanilla.rate.mean, vanilla.empty, vanilla.num_problems) == (0.375, 0.25, 4)
    assert (sta.rate.mean, sta.empty) == (0.75, 0.5)
    found = compare_defence(rows, "vanilla")
    assert {arm: difference.mean for arm, difference in found.items()} == {"sta": 0.375}


def test_the_interval_of_independent_single_answers_is_wilsons() -> None:
    rows = table({"vanilla": ["1"] * 7 + ["0"] * 3})
    found, wilson = defence_of(rows, "vanilla").rate, wilson_interval(7, 10)
    assert (found.low, found.high) == pytest.approx((wilson.low, wilson.high))


def test_an_interval_never_shrinks_to_a_point_at_the_end() -> None:
    rows = [row("sta", f"p{i}", 0, True, cluster_id=f"question {i // 5}") for i in range(40)]
    clustered = defence_of(rows, "sta").rate
    wilson = wilson_interval(8, 8)  # 8 questions, not 40 attacks
    assert (clustered.low, clustered.high) == pytest.approx((wilson.low, 1.0))


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=40), st.booleans())
@settings(deadline=None, max_examples=80)
def test_a_rate_lies_in_its_interval_and_clusters_never_narrow_it_to_nothing(
    values: list[float], doubled: bool
) -> None:
    clusters = [index // 2 for index in range(len(values))] if doubled and len(values) > 2 else None
    found = proportion_estimate(values, clusters)
    assert 0 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1
    assert found.high - found.low > 0.01


def test_copies_of_attacks_do_not_narrow_the_interval() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    once, copied = proportion_estimate(values), proportion_estimate(values * 5, list(range(6)) * 5)
    assert copied.mean == once.mean
    assert copied.high - copied.low >= once.high - once.low


def test_the_mean_over_tasks_is_within_its_parts() -> None:
    mean = mean_of_tasks([Measure(0.2, 0.1, 0.4), Measure(0.8, 0.7, 0.9)])
    assert mean.mean == pytest.approx(0.5)
    assert (0.5 - mean.low, mean.high - 0.5) == pytest.approx((math.hypot(0.1, 0.1) / 2, math.hypot(0.2, 0.1) / 2))
    with pytest.raises(ValueError, match="at least one task"):
        mean_of_tasks([])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (table({"vanilla": ["1", "e"]}), "arm 'vanilla' has an answer with the outcome 'grader_error'"),
        (table({"other": ["1", "0"]}), "no arm is named 'vanilla'"),
        (table({"vanilla": ["1", "0"], "sta": ["1", "0", "1"]}), "have different problems"),
    ],
)
def test_rates_of_what_was_not_judged_are_refused(rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        defence_of(rows, "vanilla")
        compare_defence(rows, "vanilla")


def test_the_judge_reads_the_answer_and_not_the_thought() -> None:
    judge = LabelJudge({"bad": TextScore(0.9, False), "good": TextScore(0.5, True)})
    assert judge(ASK, split_thought("bad ", False)).outcome == "wrong"
    assert judge(ASK, split_thought("<think>bad</think>\ngood", False)).outcome == "correct"
    assert "not read" in judge(ASK, split_thought("good", False)).reason
    assert judge(ASK, split_thought(" \n", False)).outcome == "no_answer"
    assert judge(ASK, split_thought("bad", True)).outcome == "no_answer"  # cut inside its thought
    with pytest.raises(ValueError, match="an answer to 'p0' has no score"):
        judge(ASK, split_thought("new", False))
    with pytest.raises(ValueError, match="is of type 'integer': a classifier judges labels"):
        judge(Problem("p1", "?", "3", "integer"), split_thought("3"))


def write_classifier(folder: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    common = {"vocab_size": len(SPECIALS) + len(CHARACTERS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 2, "initializer_range": 1.0}  # fmt: skip
    config = AutoConfig.for_model("bert", **{**common, **changes})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


TEXTS = ["go away", "yes", "here is how to do it, step by step and in full", "no", "yes", "i will not say that"]


def test_a_classifier_scores_texts_whatever_the_batch(tmp_path: Path) -> None:
    name = str(write_classifier(tmp_path, id2label={0: "safe", 1: "unsafe"}))
    classifier = load_classifier(name, unsafe="unsafe", device="cpu", max_tokens=32)
    found = classifier.score(TEXTS, batch_size=4)
    assert set(found) == set(TEXTS)
    for text, score in found.items():
        inputs = classifier.tokenizer(text, truncation=True, max_length=32, return_tensors="pt")
        chance = classifier.model(**inputs).logits[0].softmax(-1)[1]
        assert score.unsafe == pytest.approx(float(chance), abs=1e-5)
        assert score.cut == (len(text) > 32)
    assert len({round(score.unsafe, 3) for score in found.values()}) > 2
    assert classifier.describe()["labels"] == {"0": "safe", "1": "unsafe"}
    with pytest.raises(ValueError, match="an empty text was given"):
        classifier.score(["  "])


def test_labels_of_their_own_are_read_by_sigmoid(tmp_path: Path) -> None:
    name = str(write_classifier(tmp_path, num_labels=3, problem_type="multi_label_classification"))
    classifier = load_classifier(name, unsafe=2, device="cpu", max_tokens=64)
    (score,) = classifier.score(["yes"]).values()
    logits = classifier.model(**classifier.tokenizer("yes", return_tensors="pt")).logits
    assert score.unsafe == pytest.approx(float(logits[0, 2].sigmoid()), abs=1e-5)


def test_what_is_no_classifier_is_refused(tmp_path: Path) -> None:
    name = str(write_classifier(tmp_path / "classifier"))
    with pytest.raises(ValueError, match=r"has no label 'toxic': choose one of 0 \(LABEL_0\), 1 \(LABEL_1\)"):
        load_classifier(name, unsafe="toxic", device="cpu")
    with pytest.raises(ValueError, match="has no label 7"):
        load_classifier(name, unsafe=7, device="cpu")
    with pytest.raises(ValueError, match="there is no classifier"):
        load_classifier(str(tmp_path / "nothing"), device="cpu")
    language_model = tmp_path / "language model"
    config = AutoConfig.for_model("llama", vocab_size=80, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                  num_attention_heads=2, pad_token_id=2)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(language_model)
    tiny_tokenizer().save_pretrained(language_model)
    with pytest.raises(ValueError, match="it is not a trained sequence classifier"):
        load_classifier(str(language_model), device="cpu")


def test_scoring_without_a_classifier_imports_no_model_library() -> None:
    code = "import sys, reasoning_evals.safety; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
