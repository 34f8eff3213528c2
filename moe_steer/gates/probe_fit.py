"""Fit a linear probe: logistic regression with a ridge, chosen and judged on problems that the fit has not seen.

Header of the probe: ``ridge``; ``trained`` and ``held_out`` say on how many problems, positions and positive ones; ``trained`` also has
the digests of its ``prompts``; ``held_out`` also has
``auc`` with its 95% interval ``low`` and ``high`` (over problems), ``log_loss``, ``brier``, ``calibration_error``
(mean distance of predicted and observed share over the bins, weighted by their size) and the ``bins`` of the reliability plot: equally many
positions each, with the mean ``predicted`` probability, the ``observed`` share and the ``number``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import rankdata, t

Array = NDArray[np.float64]
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Tried where none is given: half the weight of the squared norm beside the mean log loss, of standardised inputs."""
_FOLDS = 5
_BINS = 10


@dataclass(frozen=True, kw_only=True)
class FittedProbe:
    """What a fit found. ``weight_D`` and ``bias`` are for inputs in their own units."""

    weight_D: Array
    bias: float
    threshold: float
    header: dict[str, Any]


def is_held_out(problem: str, share: float, seed: int) -> bool:
    """Whether a problem is kept for judging: by a hash of its name, so that it is the same for every layer and on every machine."""
    digest = hashlib.sha256(f"{seed}:{problem}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def fit_probe(
    x_ND: Array,
    y_N: NDArray[np.bool_],
    problems: Sequence[str],
    *,
    held_out: float = 0.3,
    ridge: float | None = None,
    threshold: float | None = None,
    seed: int = 0,
    prompts: Sequence[str] = (),
) -> FittedProbe:
    """A probe for ``y_N`` from states ``x_ND``. ``problems``: of each position; a problem is on one side of the split. ``prompts``: their
    digests, kept for those of the fit, so that a later run of the same problems is known.

    Without a ``ridge`` that of the least log loss in cross-validation over the problems of the fit is taken; without a ``threshold`` the
    probability with the best mean of sensitivity and specificity there. ValueError where a side has no problem, or only one label.
    """
    names = np.array(problems)
    judged_N = np.array([is_held_out(name, held_out, seed) for name in problems])
    for side, at_N in (("fit", ~judged_N), ("judge", judged_N)):
        found = {bool(label) for label in y_N[at_N]}
        if len(found) < 2:
            raise ValueError(
                f"the positions to {side} on ({int(at_N.sum())} of {len(set(names[at_N]))} problems) have one label only: give more traces, "
                "other labels, or another --held-out"
            )
    x, y, groups = x_ND[~judged_N], y_N[~judged_N], names[~judged_N]
    mean_D, scale_D = x.mean(0), x.std(0)
    scale_D = np.where(scale_D > 1e-12, scale_D, 1.0)
    x = (x - mean_D) / scale_D
    folds_N = np.array(
        [int(hashlib.sha256(f"fold:{seed}:{name}".encode()).hexdigest(), 16) % _FOLDS for name in groups]
    )
    tried = {value: _cross_predicted(x, y, folds_N, value) for value in ((ridge,) if ridge is not None else RIDGES)}
    best = min(tried, key=lambda value: _log_loss(tried[value], y))
    weight_D, bias = _logistic(x, y, best)
    weight_D = weight_D / scale_D
    bias -= float(weight_D @ mean_D)
    p_N = expit(x_ND[judged_N] @ weight_D + bias)
    said: dict[str, Any] = {"problems": len(set(groups)), "positions": len(y), "positive": int(y.sum())}
    if prompts:
        said["prompts"] = sorted({prompt for prompt, judged in zip(prompts, judged_N, strict=True) if not judged})
    header = {
        "ridge": best,
        "split": {"by": "problem", "share": held_out, "seed": seed},
        "trained": said,
        "held_out": judge(p_N, y_N[judged_N], names[judged_N].tolist()),
    }
    cut = _best_cut(tried[best], y) if threshold is None else threshold
    return FittedProbe(weight_D=weight_D, bias=bias, threshold=cut, header=header)


def judge(p_N: Array, y_N: NDArray[np.bool_], problems: Sequence[str]) -> dict[str, Any]:
    """What probabilities are worth on these positions: see the top of this module."""
    low, high = _auc_interval(p_N, y_N, problems)
    bins = []
    for part in np.array_split(np.argsort(p_N, kind="stable"), min(_BINS, len(p_N))):
        bins.append({"predicted": float(p_N[part].mean()), "observed": float(y_N[part].mean()), "number": len(part)})
    error = sum(one["number"] * abs(one["predicted"] - one["observed"]) for one in bins) / len(p_N)
    return {
        "problems": len(set(problems)),
        "positions": len(y_N),
        "positive": int(y_N.sum()),
        "auc": auc(p_N, y_N),
        "low": low,
        "high": high,
        "log_loss": _log_loss(p_N, y_N),
        "brier": float(np.mean((p_N - y_N) ** 2)),
        "calibration_error": float(error),
        "bins": bins,
    }


def auc(p_N: Array, y_N: NDArray[np.bool_]) -> float:
    """The share of (positive, negative) pairs in which the positive one has the higher score; ties count half (Mann-Whitney)."""
    positive = int(y_N.sum())
    ranks = rankdata(p_N)[y_N].sum() - positive * (positive + 1) / 2
    return float(ranks / (positive * (len(y_N) - positive)))


def _auc_interval(p_N: Array, y_N: NDArray[np.bool_], problems: Sequence[str]) -> tuple[float, float]:
    """Wilson's interval of as many trials as have the jackknife's standard error, a problem left out at a time, with the t of Kish's
    effective number of problems of the label that has fewer. A percentile bootstrap of 10 problems covers .98 in 83% of runs, this in
    93%; near 1 it knows no errors but those that it has met. 0 to 1 where one problem holds all positions of a label."""
    _, problem_N = np.unique(np.array(problems), return_inverse=True)
    positive_P, negative_P = by_label = [np.bincount(problem_N, side) for side in (y_N, ~y_N)]
    if any(np.count_nonzero(number_P) < 2 for number_P in by_label):
        return 0.0, 1.0
    scores, at_N = np.unique(p_N, return_inverse=True)
    num = len(positive_P)
    positive, negative = (np.bincount(at_N, side, minlength=len(scores)) for side in (y_N, ~y_N))
    # Pairs that are in the right order, a tie as a half: of each position with all of the other label, and of those within its problem.
    below, above = negative.cumsum() - negative / 2, positive[::-1].cumsum()[::-1] - positive / 2
    of_P = np.bincount(problem_N, np.where(y_N, below[at_N], above[at_N]))
    cells, cell_N = np.unique(problem_N * len(scores) + at_N, return_inverse=True)
    positive_C, negative_C = (np.bincount(cell_N, side) for side in (y_N, ~y_N))
    before_P = negative_P.cumsum() - negative_P
    problem_C = cells // len(scores)
    within_P = np.bincount(problem_C, positive_C * (negative_C.cumsum() - negative_C / 2 - before_P[problem_C]))
    pairs, right = positive_P.sum() * negative_P.sum(), float((positive * below).sum())
    value = right / pairs
    without_P = (right - of_P + within_P) / ((positive_P.sum() - positive_P) * (negative_P.sum() - negative_P))
    square = (num - 1) / num * float(((without_P - value) ** 2).sum())
    units = min(float(number_P.sum() ** 2 / (number_P**2).sum()) for number_P in by_label)
    trials = value * (1 - value) / square if square > 0 else units
    z = float(t.ppf(0.975, max(1.0, units - 1)))
    centre = (value + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * np.sqrt(max(0.0, value * (1 - value)) / trials + z * z / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _logistic(x: Array, y: NDArray[np.bool_], ridge: float) -> tuple[Array, float]:
    sign = np.where(y, 1.0, -1.0)

    def loss(parameters: Array) -> tuple[float, Array]:
        margin = sign * (x @ parameters[:-1] + parameters[-1])
        pull = -sign * expit(-margin) / len(y)
        value = np.logaddexp(0, -margin).mean() + ridge / 2 * parameters[:-1] @ parameters[:-1]
        return float(value), np.append(x.T @ pull + ridge * parameters[:-1], pull.sum())

    start = np.zeros(x.shape[1] + 1)
    share = np.clip(y.mean(), 1e-6, 1 - 1e-6)
    start[-1] = np.log(share / (1 - share))
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500}).x
    return found[:-1], float(found[-1])


def _cross_predicted(x: Array, y: NDArray[np.bool_], folds_N: NDArray[np.int_], ridge: float) -> Array:
    p_N = np.full(len(y), y.mean())
    for fold in np.unique(folds_N):
        at = folds_N == fold
        if len(set(y[~at].tolist())) == 2:
            weight_D, bias = _logistic(x[~at], y[~at], ridge)
            p_N[at] = expit(x[at] @ weight_D + bias)
    return p_N


def _log_loss(p_N: Array, y_N: NDArray[np.bool_]) -> float:
    p_N = np.clip(p_N, 1e-12, 1 - 1e-12)
    return float(-np.mean(np.where(y_N, np.log(p_N), np.log1p(-p_N))))


def _best_cut(p_N: Array, y_N: NDArray[np.bool_]) -> float:
    order = np.argsort(-p_N, kind="stable")
    hits = np.cumsum(y_N[order]) / y_N.sum()
    alarms = np.cumsum(~y_N[order]) / (~y_N).sum()
    return float(p_N[order][int(np.argmax(hits - alarms))])
