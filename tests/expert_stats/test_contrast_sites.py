"""Which tokens count: decisions and thoughts in hand-made traces, answers by character offsets under several
tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expert_stats import (
    Trace,
    answer_pairs,
    concise_and_verbose,
    decision_sites,
    prompt_pairs,
    thought_pairs,
    trace_from_ids,
)
from moe_steer.contrasts.sites import read_rows
from moe_steer.lab import LAB_MODEL
from moe_steer.thinking import token_tags
from stats_helpers import byte_tokenizer, metaspace_tokenizer

TOKENIZERS: dict[str, Callable[[], Any]] = {"byte": byte_tokenizer, "metaspace": metaspace_tokenizer}


@pytest.fixture(scope="module")
def lab() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(LAB_MODEL)


def trace(tokenizer: Any, thought: str, name: str = "a#0", closed: bool = True) -> Trace:
    prompt = tokenizer.encode("Wait. What is 3 + 4?<think>\n", add_special_tokens=False)
    text = thought + ("</think>\nThe answer. Wait, it is 7." if closed else "")
    return trace_from_ids(name, prompt, tokenizer.encode(text, add_special_tokens=False), token_tags(tokenizer))


def around(tokenizer: Any, item: Any, side: str) -> list[str]:
    """The two tokens on either side of each marked position: what was read, and what comes."""
    return [tokenizer.decode(item.token_ids[place : place + 2]) for place in getattr(item, side)]


def test_decisions_are_where_a_thought_stops_and_where_a_step_starts_with_a_switch_word(lab: Any) -> None:
    thought = (
        "We add. 3 + 4 = 7. Wait, let me check.\nAlternatively, so Wait is a word. Hmm, no. wait. Waiting is long."
    )
    (item,) = decision_sites([trace(lab, thought)], lab)
    assert around(lab, item, "positive") == [".</think>"]
    assert around(lab, item, "negative") == [". Wait", "\nAlternatively", ". Hmm", ". w"]


@pytest.mark.parametrize("kind", ["lab", "byte"])
def test_only_decisions_after_certain_words(lab: Any, kind: str) -> None:
    tokenizer = lab if kind == "lab" else TOKENIZERS[kind]()
    gone_on = trace(tokenizer, "7 is wrong. Wait, try 8. It is right. Wait, once more. It is right.", "a#0")
    given_up = trace(tokenizer, "7 is wrong. Wait, 9 is wrong.", "a#1")
    found = {
        words: [
            (len(item.positive), len(item.negative))
            for item in decision_sites([gone_on, given_up], tokenizer, after=words)
        ]
        for words in ("wrong.", "right. ", "strong.")
    }
    assert found == {"wrong.": [(0, 1), (1, 1)], "right. ": [(1, 1)], "strong.": []}


def test_words_that_lead_up_to_a_switch_belong_to_it(lab: Any) -> None:
    thought = "We add. But wait, no.\nNo, wait. So, alternatively, yes. Is it 7? Wait, wait. I say but wait here."
    (item,) = decision_sites([trace(lab, thought)], lab)
    assert around(lab, item, "negative") == [". But", "\nNo", ". So", "? Wait"]


def test_the_first_word_of_a_thought_and_words_outside_it_are_no_decisions(lab: Any) -> None:
    (item,) = decision_sites([trace(lab, "Wait. It is 7.")], lab)
    assert item.negative == ()
    assert len(item.positive) == 1
    assert decision_sites([trace(lab, "It is 7.")], lab, require_both=True) == []


def test_unclosed_and_empty_thoughts(lab: Any) -> None:
    unclosed = trace(lab, "It is 7. Wait, no.", closed=False)
    assert decision_sites([unclosed], lab) == []
    (item,) = decision_sites([unclosed], lab, closed_only=False)
    assert around(lab, item, "negative") == [". Wait"]
    assert item.positive == ()
    assert decision_sites([trace(lab, ""), Trace("b", (1, 2, 3), 1)], lab) == []


def test_switch_words_can_be_named(lab: Any) -> None:
    traces = [trace(lab, "It is 7. So it is. Wait.")]
    assert around(lab, decision_sites(traces, lab, ("So",))[0], "negative") == [". So"]
    with pytest.raises(ValueError, match="marker '' is empty"):
        decision_sites(traces, lab, ("",))


def test_thoughts_without_their_tags_as_pairs(lab: Any) -> None:
    short, long = trace(lab, "It is 7.", "p#0"), trace(lab, "We add 3 and 4. Wait. It is 7.", "p#1")
    first, second = thought_pairs([(short, long)])
    assert lab.decode([first.token_ids[place] for place in first.positive]) == "It is 7."
    assert lab.decode([second.token_ids[place] for place in second.negative]) == "We add 3 and 4. Wait. It is 7."
    assert (first.pair, first.negative, second.positive) == (second.pair, (), ())
    first, second = thought_pairs([(short, long)], match_lengths=True)
    assert len(first.positive) == len(second.negative) > 1
    first, second = thought_pairs([(short, long)], tokens=slice(2))
    assert len(first.positive) == len(second.negative) == 2
    with pytest.raises(ValueError, match="trace 'u' has no closed thought: leave it out of the pairs"):
        thought_pairs([(short, trace(lab, "It is", "u", closed=False))])


def test_the_shortest_and_the_longest_thought_of_each_problem(lab: Any) -> None:
    def of(name: str, words: int) -> Trace:
        return trace(lab, "so " * words + ".", name)

    traces = [of("p#0", 9), of("p#1", 2), of("p#2", 5), of("q#0", 5), of("q#1", 6), of("r#0", 40)]
    unclosed = trace(lab, "so " * 60, "p#3", closed=False)
    pairs = concise_and_verbose([*traces, unclosed])
    assert [(a.trace_id, b.trace_id) for a, b in pairs] == [("p#1", "p#0")]
    assert len(concise_and_verbose(traces, min_ratio=1.0)) == 2


@pytest.mark.parametrize("name", sorted(TOKENIZERS))
@pytest.mark.parametrize("answer", ["that is so", " the waiter waits", "\nso"])
def test_the_answer_tokens_hold_the_answer_and_nothing_of_the_question(name: str, answer: str) -> None:
    tokenizer = TOKENIZERS[name]()
    question = "wait for the solution"
    positive, negative = answer_pairs([(question, answer, "no")], tokenizer)
    text = tokenizer.decode([positive.token_ids[place] for place in positive.positive])
    assert text.strip() == answer.strip()
    rest = [token for place, token in enumerate(positive.token_ids) if place not in positive.positive]
    assert tokenizer.decode(rest).strip() == question
    assert positive.pair == negative.pair
    assert negative.positive == ()
    assert len(negative.negative) > 0


def test_a_token_that_reaches_over_the_border_belongs_to_the_answer() -> None:
    """The length of the separately tokenized question, which the release takes, is one off here."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {"a": 0, "b": 1, " ": 2, "a ": 3, "a b": 4}
    merges = [("a", " "), ("a ", "b")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocab, merges=merges)))
    positive, _ = answer_pairs([("aa", "bb", "a")], tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(positive.token_ids)) == ["a", "a b", "b"]
    assert positive.positive == (1, 2)
    assert len(tokenizer("aa")["input_ids"]) == 2


def test_a_multiple_choice_letter_and_first_tokens(lab: Any) -> None:
    rows = [("Which?", "(A)", "(B)")]
    last, _ = answer_pairs(rows, lab, tokens=slice(-2, -1))
    assert lab.decode([last.token_ids[place] for place in last.positive]) == "A"
    first, second = answer_pairs([("Which?", "a b c d e f", "a")], lab, match_lengths=True)
    assert len(first.positive) == len(second.negative)


def test_the_chat_template_is_not_opened_twice(lab: Any) -> None:
    positive, _ = answer_pairs([("1 + 1?", "It is 2.", "3")], lab, chat=True)
    text = lab.decode(positive.token_ids)
    assert (
        text
        == lab.apply_chat_template([{"role": "user", "content": "1 + 1?"}], tokenize=False, add_generation_prompt=True)
        + "It is 2."
    )
    assert lab.decode([positive.token_ids[place] for place in positive.positive]) == "It is 2."


def test_an_empty_answer_marks_nothing(lab: Any) -> None:
    positive, negative = answer_pairs([("1 + 1?", "", "3")], lab)
    assert positive.positive == ()
    assert negative.negative


def test_a_prompt_against_its_absence_with_the_same_answer(lab: Any) -> None:
    positive, negative = prompt_pairs([("1 + 1?", "It is 2.")], "Be brief.", lab)
    assert lab.decode(positive.token_ids) == "Be brief.\n1 + 1? It is 2."
    assert lab.decode(negative.token_ids) == "1 + 1? It is 2."
    answers = [
        [item.token_ids[place] for place in places]
        for item, places in ((positive, positive.positive), (negative, negative.negative))
    ]
    assert answers[0] == answers[1]
    empty, _ = prompt_pairs([("", "It is 2.")], "Be brief.", lab, chat=True)
    assert "Be brief.<" in lab.decode(empty.token_ids)
    with pytest.raises(ValueError, match="the prompt is empty"):
        prompt_pairs([("1 + 1?", "2")], " ", lab)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow gives no character offsets: use a fast tokenizer"):
        answer_pairs([("a", "b", "c")], Slow())


def test_rows_of_csv_and_json_lines(tmp_path: Path) -> None:
    columns = ("question", "matching", "not_matching")
    (tmp_path / "a.csv").write_text('question,matching,not_matching,more\n"a, b","c\nd",e,f\n')
    assert read_rows(str(tmp_path / "a.csv"), columns) == [("a, b", "c\nd", "e")]
    record = {"question": "a", "matching": "b", "not_matching": "c"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n\n" + json.dumps(record))
    assert read_rows(str(tmp_path / "a.jsonl"), columns) == [("a", "b", "c")] * 2
    (tmp_path / "b.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(ValueError, match="b.jsonl, record 1 has no text for question, matching, not_matching"):
        read_rows(str(tmp_path / "b.jsonl"), columns)
    (tmp_path / "c.jsonl").write_text("{")
    with pytest.raises(ValueError, match="c.jsonl, line 1 is not JSON"):
        read_rows(str(tmp_path / "c.jsonl"), columns)
    (tmp_path / "d.csv").write_text("question,matching,not_matching\n")
    with pytest.raises(ValueError, match="holds no records"):
        read_rows(str(tmp_path / "d.csv"), columns)
    with pytest.raises(ValueError, match="there is no file"):
        read_rows(str(tmp_path / "none.csv"), columns)
