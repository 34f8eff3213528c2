"""Rows of a forward: one sequence per row, or both answers of a pair after their common prompt, which is then computed once.

Why: the prompt of a pair is often longer than its answers, and in separate rows it would be computed twice. A shared row
has prompt, answer 1, answer 2 (tree attention, SpecInfer, arXiv 2305.09781, with two branches). The mask lets an answer see
the prompt and itself, but not the other answer; positions of each answer continue after the prompt. So every token gets
what it would get in its own row, up to rounding. Example with prompt P Q, answers A B and C:

    slot             0  1  2  3  4
    token            P  Q  A  B  C
    position         0  1  2  3  2        C continues after the prompt, as A does
    branch           0  0  1  1  2        a token sees earlier slots of branch 0 and of its own branch: C sees P Q C

5 tokens instead of 4 + 3. Position 2 of the second sequence (its C) is slot 4: ``marks`` translates positions to slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_steer.backends import layout_of
from moe_steer.contrasts.sequences import MarkedSequence, padded
from moe_steer.layers import decoder, evaluating, text_config, unwrap
from moe_steer.observe import observe_residual

_LEAST_SAVED = 1 / 8
"""Share of a row's tokens that sharing must save; with less, the longer attention costs about as much as it saves."""
_LONGEST = 2048
"""Maximum tokens of a shared row, because its mask has the square of that."""
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Row:
    """Sequences in one row of a forward; the first ``prefix`` tokens are common to all and appear once."""

    members: tuple[MarkedSequence, ...]
    prefix: int = 0

    @property
    def name(self) -> str:
        """Name of the first member."""
        return self.members[0].name

    @property
    def pair(self) -> str | None:
        """The pair of all members."""
        return self.members[0].pair

    @property
    def needed(self) -> int:
        """Tokens of the row."""
        return sum(item.needed for item in self.members) - self.saved

    @property
    def saved(self) -> int:
        """Number of tokens saved in comparison with separate rows."""
        return self.prefix * (len(self.members) - 1)

    def starts(self) -> list[int]:
        """The slot at which each member's own tokens begin."""
        starts = [self.prefix]
        for item in self.members[:-1]:
            starts.append(starts[-1] + item.needed - self.prefix)
        return starts


class Marks(NamedTuple):
    """The tokens of one side in a batch: their rows ``row_T`` and slots ``slot_T``, and the number ``sizes`` of each member."""

    row_T: Tensor
    slot_T: Tensor
    members: list[MarkedSequence]
    sizes: list[int]


def packed(sequences: Sequence[MarkedSequence]) -> list[Row]:
    """The sequences as rows; a pair shares a row if its common prompt is long enough to save time."""
    groups: dict[str | None, list[MarkedSequence]] = {}
    rows = []
    for item in sequences:
        if item.pair is None or not item.needed:
            rows.append(Row((item,)))
        else:
            groups.setdefault(item.pair, []).append(item)
    for members in groups.values():
        shared = Row(tuple(members), _common_prefix(members) if len(members) > 1 else 0)
        if shared.saved >= _LEAST_SAVED * (shared.needed + shared.saved) and shared.needed <= _LONGEST:
            rows.append(shared)
        else:
            rows += [Row((item,)) for item in members]
    return rows


def _common_prefix(members: Sequence[MarkedSequence]) -> int:
    length = 0
    for tokens in zip(*(item.token_ids[: item.needed] for item in members), strict=False):
        if len(set(tokens)) > 1:
            break
        length += 1
    return length


def marks(batch: Sequence[Row], side: str) -> Marks:
    """The marked tokens of a side ("positive" or "negative") in a batch."""
    rows: list[int] = []
    slots: list[int] = []
    members = []
    sizes = []
    for number, row in enumerate(batch):
        for item, start in zip(row.members, row.starts(), strict=True):
            positions = getattr(item, side)
            if positions:
                shift = start - row.prefix
                slots += [position + shift if position >= row.prefix else position for position in positions]
                rows += [number] * len(positions)
                members.append(item)
                sizes.append(len(positions))
    return Marks(torch.tensor(rows), torch.tensor(slots), members, sizes)


def arguments(batch: Sequence[Row], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The decoder's arguments: as ``padded`` if no row is shared, else input_ids and position_ids [B, S] and an additive
    attention_mask [B, 1, S, S] of ``dtype``."""
    if not any(row.prefix for row in batch):
        return padded([item for row in batch for item in row.members], device)
    width = max(row.needed for row in batch)
    input_ids, position_ids, branch_BS = (torch.zeros((len(batch), width), dtype=torch.int64) for _ in range(3))
    branch_BS.fill_(-1)  # padding may see itself and the prompt: a token that sees nothing becomes NaN
    for number, row in enumerate(batch):
        branch_BS[number, : row.prefix] = 0
        for branch, (item, start) in enumerate(zip(row.members, row.starts(), strict=True), start=1):
            length = item.needed - row.prefix
            own = slice(start, start + length)
            input_ids[number, : row.prefix] = torch.tensor(item.token_ids[: row.prefix])
            input_ids[number, own] = torch.tensor(item.token_ids[row.prefix : item.needed])
            position_ids[number, own] = torch.arange(row.prefix, item.needed)
            branch_BS[number, own] = branch
        position_ids[number, : row.prefix] = torch.arange(row.prefix)
    branch_BS = branch_BS.to(device)
    seen_BSS = (branch_BS[:, None, :] == branch_BS[:, :, None]) | (branch_BS[:, None, :] == 0)
    seen_BSS &= torch.ones(width, width, dtype=torch.bool, device=device).tril()
    mask_B1SS = torch.zeros(seen_BSS.shape, dtype=dtype, device=device)
    mask_B1SS.masked_fill_(~seen_BSS, torch.finfo(dtype).min)
    return {
        "input_ids": input_ids.to(device),
        "position_ids": position_ids.to(device),
        "attention_mask": mask_B1SS[:, None],
    }


def can_share(model: Any, rows: Sequence[Row], layer: int) -> bool:
    """Whether this model gives tokens the same hidden states in shared rows as in separate rows.

    False for backends in lockstep; while the model has hooks (a steering scope expects plain rows); for attention that does not
    accept a mask; for recurrent, chunked or sparse layers; for a sliding window shorter than a sequence. Otherwise a short test
    decides: one forward with a shared row and one with separate rows must agree up to ``layer``.
    """
    inner, config = unwrap(model), text_config(model)
    body = decoder(model)
    embeddings = inner.get_input_embeddings().weight
    window = getattr(config, "sliding_window", None)
    if (
        layout_of(model).lockstep
        or _is_hooked(inner)
        or not embeddings.is_floating_point()
        or getattr(config, "_attn_implementation", None) not in ("sdpa", "eager")
        or not getattr(body, "_supports_attention_backend", False)
        or not set(getattr(config, "layer_types", None) or ()) <= _PLAIN_LAYERS
        or getattr(config, "index_topk", None) is not None
        or (window and window < max(item.needed for row in rows for item in row.members))
        or not {"input_ids", "attention_mask", "position_ids"} <= set(inspect.signature(body.forward).parameters)
    ):
        return False
    return _agrees(model, next(row for row in rows if row.saved), layer)


def _is_hooked(model: Any) -> bool:
    """Whether the model has hooks, except those that transformers leaves on a model after a request for hidden states: they
    only read, on request."""
    hooks = (
        hook
        for module in model.modules()
        for kind in (module._forward_hooks, module._forward_pre_hooks)
        for hook in kind.values()
    )
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


def _agrees(model: Any, row: Row, layer: int) -> bool:
    """Test with a few of the row's own tokens: one shared row against two separate rows."""
    ids = (row.members[0].token_ids * 16)[:16]
    answers = (ids[:4] + ids[4:12], ids[:4] + ids[12:])
    pair = [
        MarkedSequence(str(number), tokens, tuple(range(len(tokens))), pair="probe")
        for number, tokens in enumerate(answers)
    ]
    embeddings = unwrap(model).get_input_embeddings().weight
    found: list[Tensor] = []
    for batch in ([Row(tuple(pair), 4)], [Row((item,)) for item in pair]):
        where = marks(batch, "positive")

        def keep(_: int, hidden: Tensor, where: Marks = where) -> None:
            found.append(hidden[where.row_T.to(hidden.device), where.slot_T.to(hidden.device)].flatten(1).float())

        try:
            with evaluating(model), torch.no_grad(), observe_residual(model, [layer], keep, stop=True):
                decoder(model)(**arguments(batch, embeddings.device, embeddings.dtype), use_cache=False)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return False  # this family's code does not accept such a mask or such positions
    shared_TD, plain_TD = found
    apart = ((shared_TD - plain_TD).norm(dim=1) / plain_TD.norm(dim=1)).max()
    return bool(apart <= torch.finfo(embeddings.dtype).eps ** 0.5)
