import dataclasses
import json
from pathlib import Path

import pytest

from expert_stats import Trace, write_traces
from launch.core.findings import nothing_fired
from launch.core.wiring import parse_coefficients, read_any_traces, text_lines, traces_of
from launch.jobs.experts import distance_from_one
from launch.jobs.experts_findings import gain_name, num_correct
from moe_steer import ExpertGain, SteeringPlan
from moe_steer.entries.audit import row_lines
from reasoning_evals import Completion


class TagTokenizer:
    """Characters as ids; <think> is 1, </think> is 2."""

    unk_token_id = None

    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {"<think>": 1, "</think>": 2}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        if text in self.get_vocab():
            return {"input_ids": [self.get_vocab()[text]]}
        return {"input_ids": [*(ord(c) for c in text.removesuffix("<think>")), 1]}

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        tags = {1: "", 2: ""} if skip_special_tokens else {1: "<think>", 2: "</think>"}
        return "".join(tags.get(number, chr(number)) for number in ids)


def completion(ids: tuple[int, ...]) -> Completion:
    return Completion(
        arm="baseline",
        task="t",
        problem_id="p",
        sample_idx=3,
        prompt="ab<think>",
        text="",
        token_ids=ids,
        finish_reason="stop",
        seed=0,
        config_hash="h",
    )


def test_completions_become_traces_with_their_thought() -> None:
    (trace,) = traces_of([completion((50, 51, 2, 52))], TagTokenizer())
    assert trace.trace_id == "baseline/t/p#3"
    assert trace.token_ids == (97, 98, 1, 50, 51, 2, 52)
    assert (trace.prompt_length, trace.thought_start, trace.thought_end) == (3, 3, 5)


def test_a_tokenizer_without_the_tags_gives_no_thought() -> None:
    class Plain(TagTokenizer):
        def get_vocab(self) -> dict[str, int]:
            return {}

    (trace,) = traces_of([completion((50, 51))], Plain())
    assert trace.thought_start is None


def test_traces_of_another_tokenizer_are_refused(tmp_path) -> None:
    path = tmp_path / "traces.jsonl"
    write_traces(path, [Trace("a", (97, 1, 50, 2, 51), 2, 2, 3), Trace("b", (97, 1, 50, 7, 51), 2, 2, 3)])
    with pytest.raises(
        ValueError, match=r"the thought of trace 'b' ends in token 7, and this model's ends in \[2\]: they"
    ):
        read_any_traces([str(path)], TagTokenizer())
    write_traces(path, [Trace("a", (97, 1, 50, 2, 51), 2, 2, 3), Trace("b", (97, 1, 50), 2, 2, None)])
    assert [trace.trace_id for trace in read_any_traces([str(path)], TagTokenizer())] == ["a", "b"]


@pytest.mark.parametrize(("ids", "fits"), [((50, 2, 52), True), ((50, 7, 52), False)])
def test_generations_of_another_tokenizer_are_refused(tmp_path, ids: tuple[int, ...], fits: bool) -> None:
    item = dataclasses.replace(completion(ids), text="2</think>4")
    path = tmp_path / "generations.jsonl"
    path.write_text(item.to_json() + "\n")
    if fits:
        assert len(read_any_traces([str(path)], TagTokenizer())) == 1
    else:
        with pytest.raises(
            ValueError, match=r"the answer to 'p' holds </think>, .* this model's \(\[2\]\): they were made"
        ):
            read_any_traces([str(path)], TagTokenizer())


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("no, 4</think>5", True),
        ("no, 45", True),
        (" no, \ufffd4", True),
        ("", True),
        ("of other tokens", False),
        ("so, 4</think>5", False),
    ],
    ids=["as written", "tags left out", "cut in a character", "no text", "another", "the end alike"],
)
def test_tokens_that_are_another_text_are_of_another_tokenizer(tmp_path: Path, text: str, fits: bool) -> None:
    """Every id exists here too, and no tag is in the text: a command that was not told the model read its default's tokens."""
    item = dataclasses.replace(completion((*map(ord, "no, 4"), 2, ord("5"))), text=text)
    (tmp_path / "generations.jsonl").write_text(item.to_json() + "\n")
    if fits:
        assert len(read_any_traces([str(tmp_path)], TagTokenizer())) == 1
    else:
        with pytest.raises(ValueError, match="the answer to 'p' are another text here: they were made with another to"):
            read_any_traces([str(tmp_path)], TagTokenizer())


def test_the_refusal_names_the_model_of_the_run(tmp_path: Path) -> None:
    item = dataclasses.replace(completion((*map(ord, "no, 4"), 2, ord("5"))), text="of other tokens")
    (tmp_path / "generations.jsonl").write_text(item.to_json() + "\n")
    arms = {item.arm: {"sampler": {"model": "some/model"}}}
    (tmp_path / "run.json").write_text(json.dumps({"version": 1, "config": {"arms": arms}}))
    for given in (tmp_path, tmp_path / "generations.jsonl"):
        with pytest.raises(ValueError, match="with another tokenizer; give that model, some/model, or sample again"):
            read_any_traces([str(given)], TagTokenizer())


def test_no_traces(tmp_path) -> None:
    with pytest.raises(ValueError, match="no traces at"):
        read_any_traces([str(tmp_path / "none.jsonl")], TagTokenizer())
    with pytest.raises(ValueError, match="or the folder of a run"):
        read_any_traces([str(tmp_path)], TagTokenizer())
    (tmp_path / "generations.jsonl").write_text("")
    with pytest.raises(ValueError, match="there is nothing to count"):
        read_any_traces([str(tmp_path)], TagTokenizer())


def test_coefficients() -> None:
    assert parse_coefficients(["<think>=1", "a=b=-0.5"]) == {"<think>": 1.0, "a=b": -0.5}
    for wrong in ("Wait", "=1", "Wait=x", ""):
        with pytest.raises(ValueError, match="is not a coefficient: write NAME=NUMBER"):
            parse_coefficients([wrong])


def test_gains() -> None:
    assert sorted([64.0, 0.25, 0.0, 2.0], key=distance_from_one) == [2.0, 0.25, 64.0, 0.0]
    assert gain_name(64.0) == "gain 64"
    assert num_correct([]) == {}


def test_a_run_in_which_nothing_fired_says_so() -> None:
    plan = SteeringPlan(experts=[ExpertGain(1, 2, 4.0)])
    row = {"kind": "expert", "layer": 1, "expert": 2, "gain": 4.0, "tokens": 0, "weight_added": 0.0}
    assert "nothing of the plan fired in the whole run" in (nothing_fired(plan, [row]) or "")
    assert "met a token in scope all; the arm" in (nothing_fired(plan, [row]) or "")
    gated = SteeringPlan(experts=[ExpertGain(1, 2, 4.0, when={"on": "spent", "above": 5000})])
    assert "met a token in scope all while its gate was open; the arm" in (nothing_fired(gated, [row]) or "")
    assert nothing_fired(plan, [row | {"tokens": 3}]) is None
    assert nothing_fired(SteeringPlan(), []) is None
    assert "is not known, the run has lost its audit" in (nothing_fired(plan, []) or "")
    assert row_lines([row]) == ["layer 1 expert 2 x4: selected by 0 tokens, weight added 0"]


def test_answers_of_several_arms_are_not_mixed(tmp_path) -> None:
    items = [dataclasses.replace(completion((50, 2, 52)), arm=arm) for arm in ("baseline", "steered")]
    (tmp_path / "generations.jsonl").write_text("".join(item.to_json() + "\n" for item in items))
    with pytest.raises(ValueError, match=r"holds the answers of 2 arms \(baseline, steered\): name one with --arm"):
        read_any_traces([str(tmp_path)], TagTokenizer())
    (trace,) = read_any_traces([str(tmp_path)], TagTokenizer(), "steered")
    assert trace.trace_id.startswith("steered/")
    with pytest.raises(ValueError, match="holds no answers of the arm 'placebo': it has"):
        read_any_traces([str(tmp_path)], TagTokenizer(), "placebo")


def test_texts_of_other_editors(tmp_path: Path) -> None:
    """A byte order mark is no part of the first text; UTF-16 without one is no UTF-8, though it can be read as such."""
    file = tmp_path / "texts.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    assert text_lines(str(file)) == ["one", "two"]
    file.write_bytes("one\ntwo\n".encode("utf-16-le"))
    with pytest.raises(ValueError, match="texts.txt' holds characters 0, as UTF-16 has: save it in UTF-8"):
        text_lines(str(file))
    file.write_bytes(b" \n\n")
    with pytest.raises(ValueError, match="texts.txt' holds no words: give one with a text a line"):
        text_lines(str(file))
