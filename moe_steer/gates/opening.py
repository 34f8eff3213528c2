"""Hysteresis and ramps, for all rows and tokens of a forward at once."""

from __future__ import annotations

from torch import Tensor

from moe_steer.gates.conditions import Condition
from moe_steer.tokens.positions import carried


def holds(condition: Condition, value_BS: Tensor, open_B1: Tensor, real_BS: Tensor | None) -> Tensor:
    """bool [B, S]: whether the condition is open at each token; ``open_B1``: before them. Padding (None: there is none, and one token a
    row) has what was before it."""
    if condition.above is not None:
        opens_BS, closes_BS = value_BS >= condition.opens, value_BS < condition.closes
    else:
        opens_BS, closes_BS = value_BS <= condition.opens, value_BS > condition.closes
    if real_BS is None:
        return opens_BS.logical_or_(open_B1 > closes_BS)  # was open and is not closed
    return carried(open_B1[:, 0], opens_BS, (opens_BS | closes_BS) & real_BS)[:, 1:]


def tokens_open(open_BS: Tensor, count_B1: Tensor, real_BS: Tensor | None) -> Tensor:
    """[B, S]: the number of the token since the gate opened, from 1; 0 where it is closed. ``count_B1``: of the token before;
    ``real_BS``: as for ``holds``."""
    if real_BS is None:
        return (count_B1 + 1).mul_(open_BS)
    count_B = count_B1[:, 0].long()
    number_BS = real_BS.long().cumsum(1)
    # The place of the latest closed token, counted from these tokens' start; before them it was count_B tokens ago.
    closed_BS = carried(-count_B, number_BS, ~open_BS & real_BS)[:, 1:]
    return number_BS - closed_BS
