"""Step ends on real DeepSeek-R1 traces under real tokenizers, against a regular expression over the text."""

from __future__ import annotations

import bisect
import functools
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_steer.tokens.positions import PositionTracker
from moe_steer.tokens.scopes import SpecialTokens, special_tokens

NAMES = """
J. J. Thomson, R. Feynman, A. Einstein, E. Schr\u00f6dinger, N. Bohr, P. A. M. Dirac, M. Planck, E. Fermi, S. N. Bose, C. V. Raman,
L. D. Landau, E. M. Lifshitz, J. D. Jackson, D. J. Griffiths, R. A. Millikan, H. A. Lorentz, H. Hertz, G. Ohm, A. A. Michelson,
E. W. Morley, A. Sommerfeld, M. Born, J. von Neumann, L. de Broglie, W. H. Bragg, J. C. Maxwell, S. Hawking, K. Thorne, W. Pauli,
A. Compton, G. Galilei, B. Franklin, H. Cavendish, L. Boltzmann, J. W. Gibbs, J. Bardeen, F. Zernike, T. Young, A. Fresnel,
J. H. Poynting, O. Heaviside, N. Tesla, J.J. Thomson, I. Rabi, E. Purcell, J. R. Taylor, Albert A. Michelson, W. Heisenberg
"""
SHARED = Path(__file__).parents[3] / "shared" / "data"
TRACES = SHARED / "physics_r1_traces"
END = re.compile(r"""(?:\.{1,3}|(?<!\\)!|[?\u2026\u3002\uff01\uff1f])(?:["'\u2019\u201d)\]*}$|]|\\\)|\\\])*(?=\s|\Z)""")
ABBREVIATION = re.compile(r"\b(?:[Aa]pprox|[Ee]qs?|[Ff]igs?|vs|Dr|Mr|Mrs|Prof|cf|[Rr]efs?|resp|i\.e|e\.g)\Z")
LIST_NUMBER = re.compile(r"(?:\A|\n)[\s#*>_(-]*\d+\Z")


def thoughts(share: int) -> list[str]:
    """The thoughts of every ``share``-th trace."""
    found = []
    for name in ("mechanics", "optics", "electro"):
        with gzip.open(TRACES / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["solution"] for line in file]
        found += [text.partition("</think>")[0] for text in texts[::share] if text]
    return found


def stops(text: str) -> list[int]:
    """Places of the full stops, question marks and exclamation marks that end a sentence."""
    found = []
    for match in END.finditer(text):
        before = text[max(0, match.start() - 60) : match.start()]
        one_stop = match.group().startswith(".") and not match.group().startswith("..")
        if not (one_stop and (ABBREVIATION.search(before) or LIST_NUMBER.search(before))):
            found.append(match.start())
    return found


def ends_of(ids: list[int], special: SpecialTokens) -> list[int]:
    """Tokens in scope step_end:sentence, by the tracker that a steered forward uses."""
    tracker = PositionTracker(["step_end:sentence"], special)
    call = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "use_cache": True,
    }
    tracker.before(call)
    mask_T = tracker.mask("step_end:sentence")
    assert mask_T is not None
    return mask_T.nonzero()[:, 0].tolist()


@functools.cache
def tokenizer_of(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded traces are not beside the checkout")
@pytest.mark.parametrize("name", ["deepseek-r1", "qwen-3"])
def test_sentence_ends_are_those_of_a_regular_expression(name: str) -> None:
    tokenizer = tokenizer_of(name)
    special = special_tokens(tokenizer)
    hits = found = wanted = 0
    for text in thoughts(48):
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
        ends = set(ends_of(encoded["input_ids"], special))
        found += len(ends)
        for place in stops(text):
            token = bisect.bisect_right(starts, place) - 1
            wanted += 1
            # Closers may be a token of their own, and where the next token decides it is that one.
            hit = next((near for near in (token, token + 1, token + 2) if near in ends), None)
            hits += hit is not None
            ends.discard(-1 if hit is None else hit)
    assert wanted > 1500
    assert hits / found >= 0.99, f"precision {hits / found:.4f} of {found}"
    assert hits / wanted >= 0.99, f"recall {hits / wanted:.4f} of {wanted}"


def ends_inside(name: str, text: str, part: str) -> list[str]:
    """What stands around each sentence end within a part of a thought, or right behind it."""
    text = f"<think>\n{text}"
    tokenizer = tokenizer_of(name)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    first = text.index(part)
    starts = [start for start, _ in encoded["offset_mapping"]]
    ends = [starts[token] for token in ends_of(encoded["input_ids"], special_tokens(tokenizer))]
    return [text[max(0, place - 12) : place + 12] for place in ends if first <= place <= first + len(part)]


@pytest.mark.skipif(not TRACES.is_dir(), reason="the tokenizers are not beside the checkout")
@pytest.mark.parametrize("name", ["deepseek-r1", "qwen-3"])
def test_initials_of_names_end_no_sentence(name: str) -> None:
    people = [person.strip() for person in NAMES.replace("\n", " ").split(",")]
    for words in (
        "This was shown by {} in 1913, as",
        "Okay,\n- {}: a book\n",
        "Units (see {}) matter,",
        "then {} wrote that,",
    ):
        text = " ".join(words.format(person) for person in people)
        found = ends_inside(name, text, text)
        assert not found


@pytest.mark.skipif(not TRACES.is_dir(), reason="the tokenizers are not beside the checkout")
@pytest.mark.parametrize("name", ["deepseek-r1", "qwen-3"])
@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("the force acts at B. Then it turns", "B."),
        ("I choose B. So the answer is", "B."),
        ("the charge is Q. The field", "Q."),
        ("it moves from A to C. Wait, no", "C."),
        ("proportional to L. Hence the", "L."),
        ("a force of 5 N. Energy is kept", "N."),
        ("so E = F. Magnetisation follows", "F."),
        ("a charge of 24 \u00b5C. Voltage across", "C."),
        ("about 29.9 MeV. Beta is", "V."),
        ("power P = F * V. V is 30 mph", "V."),
        ("from equation A. 3 volts remain", "A."),
        ("the term with T. x is small", "T."),
        ("so \u2207\u00d7E = B. Maxwell's law", "B."),
        ("as R. Feynman says, at B. Let me see", "B."),
    ],
)
def test_a_variable_or_unit_of_one_letter_ends_a_sentence(name: str, text: str, part: str) -> None:
    assert len(ends_inside(name, text, part)) == 1


@pytest.mark.skipif(not TRACES.is_dir(), reason="the tokenizers are not beside the checkout")
@pytest.mark.parametrize("name", ["deepseek-r1", "qwen-3"])
def test_letters_of_a_list_end_no_sentence(name: str) -> None:
    text = "The options:\nA. The force\n**B. Both of them**\n- c. So none"
    assert not ends_inside(name, text, text)


@pytest.mark.skipif(not TRACES.is_dir(), reason="the tokenizers are not beside the checkout")
@pytest.mark.parametrize("name", ["deepseek-r1", "qwen-3"])
def test_initials_are_no_ends_and_letters_at_an_end_are(name: str) -> None:
    """The bar stands behind each token at which a sentence is known to have ended."""
    tokenizer = tokenizer_of(name)
    special = special_tokens(tokenizer)
    for marked in [
        "As J. J. Thomson showed, it holds.| Then R. Feynman agrees.|",
        "We choose C. However|, A. Einstein said so.|",
        "by G. von Neumann.| The end of the U.S. army.| Prof. A. Einstein.| He",
        "It stops at point B. Then| it turns.| So the answer is B. Wait|, no.|",
        "The force is 5 N. Energy| is kept.| Let x = F. Current| flows.|",
        "A. 5 m\nB. 6 m\nC. 7 m",
    ]:
        ids = tokenizer("<think>\n" + marked.replace("|", ""), add_special_tokens=False)["input_ids"]
        ends = set(ends_of(ids, special))
        shown = "".join(tokenizer.decode([token]) + "|" * (at in ends) for at, token in enumerate(ids))
        assert shown == "<think>\n" + marked
