"""Markers: the scanner against a naive one, token forms under several kinds of tokenizers, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expert_stats import MarkerSet
from moe_steer.tokens.markers import Marker, Span, WordEdges, find_spans
from stats_helpers import MARKERS, byte_tokenizer, metaspace_tokenizer, word_tokenizer

tokens = st.lists(st.integers(0, 4), max_size=30)
forms = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple), min_size=1, max_size=4)


def naive_spans(ids: list[int], wanted: tuple[tuple[int, ...], ...]) -> list[tuple[int, int]]:
    found, at = [], 0
    while at < len(ids):
        lengths = [len(form) for form in wanted if tuple(ids[at : at + len(form)]) == form]
        if lengths:
            found.append((at, at + max(lengths)))
        at += max(lengths, default=1)
    return found


@settings(deadline=None, max_examples=200)
@given(tokens, forms)
def test_the_scanner_finds_what_a_naive_scan_finds(ids: list[int], wanted: list[tuple[int, ...]]) -> None:
    marker = Marker("x", tuple(wanted))
    assert find_spans(np.array(ids, dtype=np.int64), marker.forms) == naive_spans(ids, marker.forms)


def test_longest_form_first_and_no_overlap() -> None:
    found = MARKERS.find_occurrences([3, 4, 5, 4, 3, 4, 1, 3, 2])
    assert found == {
        "<think>": [Span(6, 7)],
        "</think>": [Span(8, 9)],
        "Alternatively": [Span(0, 2), Span(2, 3), Span(4, 6)],
    }


def test_an_occurrence_inside_a_word_is_none() -> None:
    edges = WordEdges(starts_with_letter=frozenset({1, 2}), ends_with_letter=frozenset({1, 2, 3}))
    wait = ((1,),)
    for ids, expected in (([1, 9], 1), ([1, 2], 0), ([3, 1], 0), ([9, 1, 3], 1)):
        assert len(find_spans(np.array(ids), wait, edges)) == expected


def decoded(tokenizer: object, markers: MarkerSet) -> dict[str, set[str]]:
    return {m.name: {tokenizer.decode(list(form)) for form in m.forms} for m in markers.markers}  # type: ignore[attr-defined]


@pytest.mark.parametrize("vocab_size", [262, 300, 400])
def test_byte_level_forms_are_found_in_every_context(vocab_size: int) -> None:
    tokenizer = byte_tokenizer(vocab_size)
    markers = MarkerSet.from_tokenizer(tokenizer)
    assert {text.strip() for text in decoded(tokenizer, markers)["Alternatively"]} == {"Alternatively", "alternatively"}
    assert [m.forms for m in markers.markers[:2]] == [
        ((tokenizer.convert_tokens_to_ids(t),),) for t in ("<think>", "</think>")
    ]
    for text in (
        "Alternatively, x",
        "x. Alternatively",
        "x\n\nAlternatively\n",
        "(alternatively)",
        "so alternatively we",
    ):
        found = markers.find_occurrences(tokenizer.encode(text))
        assert [len(found[name]) for name in markers.names] == [0, 0, 1], text


def test_whole_words_only_unless_asked_otherwise() -> None:
    tokenizer = byte_tokenizer(300)
    text = "Wait, so awaiting the waiter; wait. Solution: So"
    whole = MarkerSet.from_tokenizer(tokenizer, ("Wait", "So"))
    parts = MarkerSet.from_tokenizer(tokenizer, ("Wait", "So"), whole_words=False)
    count = {name: len(spans) for name, spans in whole.find_occurrences(tokenizer.encode(text)).items()}
    assert count == {"Wait": 2, "So": 2}
    assert sum(map(len, parts.find_occurrences(tokenizer.encode(text)).values())) > 4
    assert whole.to_dict() != parts.to_dict()


def test_case_of_the_first_letter_can_matter() -> None:
    tokenizer = byte_tokenizer()
    markers = MarkerSet.from_tokenizer(tokenizer, ("Wait",), either_case=False)
    assert decoded(tokenizer, markers)["Wait"] == {"Wait", " Wait"}


def test_other_kinds_of_tokenizers() -> None:
    metaspace = metaspace_tokenizer()
    markers = MarkerSet.from_tokenizer(metaspace, ("Wait",))
    assert len(markers.find_occurrences(metaspace.encode("Wait, we wait for the waiter"))["Wait"]) == 2
    words = word_tokenizer()
    markers = MarkerSet.from_tokenizer(words, ("<think>", "Wait"))
    assert len(markers.find_occurrences(words.encode("<think> the Wait the wait"))["Wait"]) == 2


def test_a_tag_of_several_tokens_is_refused_unless_asked_for() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"marker '<plan>' is not a token of this tokenizer .* split_tags=True"):
        MarkerSet.from_tokenizer(tokenizer, ("<plan>",))
    markers = MarkerSet.from_tokenizer(tokenizer, ("<plan>",), split_tags=True)
    assert len(markers.find_occurrences(tokenizer.encode("x <plan> y\n<plan>\n"))["<plan>"]) == 2


def test_an_unknown_word_is_refused() -> None:
    with pytest.raises(ValueError, match="marker 'Hmm' cannot be written with this tokenizer"):
        MarkerSet.from_tokenizer(word_tokenizer(), ("Hmm",))
    with pytest.raises(ValueError, match="marker '<plan>' is not a token"):
        MarkerSet.from_tokenizer(word_tokenizer(), ("<plan>",))


def test_coefficients_follow_rice_and_can_be_changed() -> None:
    tokenizer = byte_tokenizer()
    names = ("<think>", "</think>", "Alternatively", "Wait")
    assert MarkerSet.from_tokenizer(tokenizer, names).coefficients == (1.0, -1.0, -1.0, 0.0)
    assert MarkerSet.from_tokenizer(tokenizer, names, {"Wait": -0.5}).coefficients == (1.0, -1.0, -1.0, -0.5)
    with pytest.raises(ValueError, match="a coefficient is given for 'Hmm'"):
        MarkerSet.from_tokenizer(tokenizer, names, {"Hmm": 1.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "output"}, "position is 'output': choose one of input, predicted"),
        ({"token": "middle"}, "token is 'middle': choose one of last, first"),
        ({"repeats": "some"}, "repeats is 'some': choose one of all, first"),
        ({"coefficients": (1.0,)}, "give one finite number for each"),
        ({"coefficients": (1.0, float("nan"), 0.0)}, "give one finite number for each"),
        ({"markers": ()}, "needs at least one marker"),
        ({"markers": (Marker("a", ((1,),)),) * 2}, "are not distinct"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MarkerSet(**{"markers": MARKERS.markers, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [(), ((),), ((-1,),)])
def test_wrong_forms_are_refused(wrong: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="marker 'x' has"):
        Marker("x", wrong)


def test_where_a_predicted_marker_is_read_by_default() -> None:
    assert MARKERS.token == "last"
    assert MarkerSet(markers=MARKERS.markers, position="predicted").token == "first"
