"""Where a row stands: its open thought, and the token forms that it ends with. Ids are [B, T]; the padding may be any id that is not part
of a tag or a form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moe_steer.thinking import TokenTags

Form = tuple[int, ...]


class OpenThought(NamedTuple):
    """For each row: whether the next token belongs to a thought, and the position after the tag that opened it."""

    inside_B: Tensor
    start_B: Tensor


def open_thought(ids_BT: Tensor, tags: TokenTags) -> OpenThought:
    """The last tag of a row decides, whether prompt or model wrote it. Only what begins an answer ends a thought: in harmony
    the end of one message may be followed by another thought."""
    start_B = last_end(ids_BT, tags.opening)
    return OpenThought(start_B > last_end(ids_BT, tags.answering), start_B)


def last_end(ids_BT: Tensor, forms: Iterable[Form]) -> Tensor:
    """[B]: the position after the last occurrence of any of the forms; 0 where there is none.

    >>> last_end(torch.tensor([[5, 7, 5, 6], [6, 6, 6, 6]]), [(7, 5)]).tolist()
    [3, 0]
    """
    return _last(ids_BT, [(form, len(form)) for form in forms])


def last_start(ids_BT: Tensor, forms: Iterable[Form]) -> Tensor:
    """[B]: the position of the first token of the last occurrence of any of the forms; -1 where there is none."""
    return _last(ids_BT, [(form, 1) for form in forms]) - 1


def ends_with(ids_BT: Tensor, form: Form) -> Tensor:
    """[B]: whether the ids so far end with the form; every row ends with the empty one."""
    batch, length = ids_BT.shape
    if len(form) > length:
        return torch.zeros(batch, dtype=torch.bool, device=ids_BT.device)
    return (ids_BT[:, length - len(form) :] == torch.tensor(form, dtype=torch.long, device=ids_BT.device)).all(-1)


def completed_by(ids_BT: Tensor, forms: Sequence[Form]) -> tuple[Tensor, Tensor]:
    """The tokens that would complete a form as the next token: distinct ids [N], and [B, N] whether in this row."""
    ends = sorted({form[-1] for form in forms})
    would_BN = torch.zeros(ids_BT.shape[0], len(ends), dtype=torch.bool, device=ids_BT.device)
    would_BN[:, sorted({ends.index(form[0]) for form in forms if len(form) == 1})] = True
    for form in forms:
        if len(form) > 1:
            would_BN[:, ends.index(form[-1])] |= ends_with(ids_BT, form[:-1])
    return torch.tensor(ends, dtype=torch.long, device=ids_BT.device), would_BN


def checked_forms(forms: Iterable[Iterable[int]], what: str) -> tuple[Form, ...]:
    """Sorted, without duplicates; ValueError for none, for an empty form, or for a negative id."""
    found = tuple(sorted({tuple(int(token) for token in form) for form in forms}))
    if not found or () in found or any(token < 0 for form in found for token in form):
        raise ValueError(f"{what} has the token forms {[list(form) for form in found]}: give non-empty ids >= 0")
    return found


def check_vocabulary(forms: Iterable[Form], scores_BV: Tensor) -> None:
    """ValueError when an id is beyond the logits: the forms belong to another tokenizer."""
    largest = max(token for form in forms for token in form)
    if largest >= scores_BV.shape[-1]:
        raise ValueError(
            f"token id {largest} is beyond the {scores_BV.shape[-1]} logits: take the ids from this model's tokenizer"
        )


def _last(ids_BT: Tensor, anchored: Iterable[tuple[Form, int]]) -> Tensor:
    """1 + the position of the anchor-th token of the last occurrence of any form; 0 where there is none."""
    batch, length = ids_BT.shape
    best_B = torch.zeros(batch, dtype=torch.long, device=ids_BT.device)
    for form, anchor in anchored:
        width = length - len(form) + 1
        if width < 1:
            continue
        here_BW = ids_BT[:, :width] == form[0]
        for offset, token in enumerate(form[1:], 1):
            here_BW = here_BW & (ids_BT[:, offset : offset + width] == token)
        places_W = torch.arange(anchor, anchor + width, device=ids_BT.device)
        best_B = torch.maximum(best_B, (here_BW * places_W).amax(-1))
    return best_B


def begun_tag(ids_BT: Tensor, tag: Form, held_B: Tensor) -> Tensor:
    """[B]: tokens of a tag that already stand at the end of the ids, its last one apart; at most ``held_B``, the tokens of the thought."""
    begun_B = torch.zeros_like(held_B)
    for length in range(1, len(tag)):
        begun_B[ends_with(ids_BT, tag[:length])] = length
    return torch.minimum(begun_B, held_B)


class Closing(NamedTuple):
    """For each row: whether the next token belongs to a thought, the tokens that it holds without those of a begun closing tag, how many
    of that tag stand there, and the token with which the tag begins or goes on."""

    inside_B: Tensor
    held_B: Tensor
    begun_B: Tensor
    next_B: Tensor


def closing(ids_BT: Tensor, scores_BV: Tensor, tags: TokenTags) -> Closing:
    """How far the open thought is, and what would close it. ValueError when the tag is beyond the logits."""
    check_vocabulary([tags.close], scores_BV)
    inside_B, start_B = open_thought(ids_BT, tags)
    all_B = ids_BT.shape[1] - start_B
    begun_B = begun_tag(ids_BT, tags.close, all_B)
    return Closing(inside_B, all_B - begun_B, begun_B, torch.tensor(tags.close, device=scores_BV.device)[begun_B])


def only(scores_BV: Tensor, rows_B: Tensor, token_B: Tensor) -> Tensor:
    """The logits, where in the rows of the mask only one token, that row's own of ``token_B``, is left."""
    if not bool(rows_B.any()):
        return scores_BV
    token_B1 = token_B[:, None]
    forced_BV = scores_BV.masked_fill(rows_B[:, None], float("-inf"))
    kept_B1 = forced_BV.gather(1, token_B1).masked_fill(rows_B[:, None], 0.0)
    return forced_BV.scatter_(1, token_B1, kept_B1)
