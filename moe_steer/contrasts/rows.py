"""Rows of a forward: one sequence each, or the answers of a pair behind the prompt that they share, which then runs once.

A shared row reads prompt, answer, answer. Every answer sees the prompt and itself, not the answer before it, and its
positions go on from the prompt: tree attention (SpecInfer, arXiv 2305.09781) with two branches. Each token then gets what
it would get in a row of its own, up to rounding.
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
from moe_steer.layers import decoder, text_config, unwrap
from moe_steer.observe import observe_residual

_LEAST_SAVED = 1 / 8
"""Of a row's tokens; below it, the longer attention costs about what the prompt saves."""
_LONGEST = 2048
"""Tokens of a shared row: its mask has the square of that."""
_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, slots=True)
class Row:
    """Sequences in one row of a forward; the first ``prefix`` tokens are the same in all and stand there once."""

    members: tuple[MarkedSequence, ...]
    prefix: int = 0

    @property
    def name(self) -> str:
        """Of the first."""
        return self.members[0].name

    @property
    def pair(self) -> str | None:
        """Of all."""
        return self.members[0].pair

    @property
    def needed(self) -> int:
        """Tokens of the row."""
        return sum(item.needed for item in self.members) - self.saved

    @property
    def saved(self) -> int:
        """Tokens fewer than in rows of their own."""
        return self.prefix * (len(self.members) - 1)

    def starts(self) -> list[int]:
        """Where the own tokens of every member begin."""
        starts = [self.prefix]
        for item in self.members[:-1]:
            starts.append(starts[-1] + item.needed - self.prefix)
        return starts


class Marks(NamedTuple):
    """The tokens of one side in a batch: ``row_T``, ``slot_T`` say where, ``sizes`` how many each member has."""

    row_T: Tensor
    slot_T: Tensor
    members: list[MarkedSequence]
    sizes: list[int]


def packed(sequences: Sequence[MarkedSequence]) -> list[Row]:
    """The sequences in rows, pairs in one row where they start alike for long enough to gain by it."""
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
    """``side``: "positive" or "negative"."""
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
    """What the decoder is called with: as ``padded`` where nothing is shared, else input_ids and position_ids [B, S] and
    an additive attention_mask [B, 1, S, S] of ``dtype``."""
    if not any(row.prefix for row in batch):
        return padded([item for row in batch for item in row.members], device)
    width = max(row.needed for row in batch)
    input_ids, position_ids, branch_BS = (torch.zeros((len(batch), width), dtype=torch.int64) for _ in range(3))
    branch_BS.fill_(-1)  # padding sees itself and the prompt, since a token that sees nothing becomes NaN
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
    """Whether this model gives the tokens of shared rows what it gives them in rows of their own.

    No: under backends whose ranks run whole forwards together; while something hooks the model (a steering scope reads
    plain rows); for attention that takes no mask from outside; for recurrent, chunked or sparse layers; for a sliding
    window shorter than a sequence. Then one short forward each way up to ``layer`` must agree.
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
    """Whether anybody hooks the model, but for what transformers leaves on one that was once asked for hidden states: it reads
    only, when asked."""
    hooks = (
        hook
        for module in model.modules()
        for kind in (module._forward_hooks, module._forward_pre_hooks)
        for hook in kind.values()
    )
    return any(getattr(hook, "__module__", None) != "transformers.utils.output_capturing" for hook in hooks)


def _agrees(model: Any, row: Row, layer: int) -> bool:
    """A few of the row's own tokens, as one shared row and as two."""
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

        was_training = unwrap(model).training
        unwrap(model).eval()
        try:
            with torch.no_grad(), observe_residual(model, [layer], keep, stop=True):
                decoder(model)(**arguments(batch, embeddings.device, embeddings.dtype), use_cache=False)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError):
            return False  # such a mask or such positions are nothing that this family's code expects
        finally:
            unwrap(model).train(was_training)
    shared_TD, plain_TD = found
    apart = ((shared_TD - plain_TD).norm(dim=1) / plain_TD.norm(dim=1)).max()
    return bool(apart <= torch.finfo(embeddings.dtype).eps ** 0.5)
