"""Step ends on real DeepSeek-R1 traces under real tokenizers, against a regular expression over the text."""

from __future__ import annotations

import bisect
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_steer.tokens.positions import PositionTracker
from moe_steer.tokens.scopes import SpecialTokens, special_tokens

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


@pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded traces are not beside the checkout")
@pytest.mark.parametrize("name", ["deepseek-r1", "qwen-3"])
def test_sentence_ends_are_those_of_a_regular_expression(name: str) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
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


@pytest.mark.skipif(not TRACES.is_dir(), reason="the tokenizers are not beside the checkout")
@pytest.mark.parametrize("name", ["deepseek-r1", "qwen-3"])
def test_initials_are_no_ends_and_letters_at_an_end_are(name: str) -> None:
    """The bar stands behind each token at which a sentence is known to have ended."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
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
