"""A probe fitted to labelled tokens: logistic regression with an L2 penalty, on standardised hidden states."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Fitted(NamedTuple):
    """sigmoid(weight_D . h_D + bias), in the units of the hidden states."""

    weight_D: Tensor
    bias: float


def fit_logistic(hidden_TD: Tensor, labels_T: Tensor, weights_T: Tensor, penalty: float = 1.0) -> Fitted:
    """Minimises sum_t w_t log(1 + exp(-y_t z_t)) / sum_t w_t + penalty / (2 T) |v|^2 over v and b, where z_t = v . x_t + b, x_t are the hidden
    states shifted and scaled to mean 0 and variance 1 a dimension, and y_t is +1 or -1. In float64, to convergence; the minimum is
    unique. ValueError where one label is missing: nothing separates the tokens then.
    """
    labels_T = labels_T.bool()
    if bool(labels_T.all()) or not bool(labels_T.any()):
        raise ValueError(
            f"all {len(labels_T)} labelled tokens have one label: a probe needs both, give more problems, or harder ones"
        )
    x_TD = hidden_TD.double()
    mean_D, scale_D = x_TD.mean(0), x_TD.std(0, correction=0).clamp(min=1e-6)
    x_TD = (x_TD - mean_D) / scale_D
    signs_T = labels_T.double() * 2 - 1
    share_T = weights_T.double() / weights_T.double().sum()
    v_D = torch.zeros(x_TD.shape[1], dtype=torch.float64, requires_grad=True)
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([v_D, b], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        margins_T = signs_T * (x_TD @ v_D + b)
        value = (share_T * torch.nn.functional.softplus(-margins_T)).sum() + penalty / (
            2 * len(x_TD)
        ) * v_D.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weight_D = (v_D / scale_D).detach()
    return Fitted(weight_D.float(), float(b.detach() - weight_D @ mean_D))
