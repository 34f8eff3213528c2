"""One step of BatchTopK training (arXiv 2412.06410): selection, loss and gradients, by hand.

Of T x F activations only T x k are not 0, so everything after the encoder's matrix product runs on sparse matrices; on a CPU
that is about twice as fast as letting autograd work on dense ones. Letters: T tokens, D model width, F atoms, N entries.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta", category=UserWarning)


@dataclass(kw_only=True, slots=True)
class Weights:
    """The learned tensors, for scaled activations; also used for their gradients."""

    W_enc_DF: Tensor
    b_enc_F: Tensor
    W_dec_FD: Tensor
    b_dec_D: Tensor

    def fields(self) -> dict[str, Tensor]:
        """The tensors by name, in a fixed order."""
        return {
            "W_enc_DF": self.W_enc_DF,
            "b_enc_F": self.b_enc_F,
            "W_dec_FD": self.W_dec_FD,
            "b_dec_D": self.b_dec_D,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Entries:
    """The non-zero entries of a [T, F] matrix, row by row."""

    rows_N: Tensor
    columns_N: Tensor
    values_N: Tensor
    num_rows: int
    num_columns: int

    def csr(self, values_N: Tensor | None = None) -> Tensor:
        """As a sparse matrix [T, F], with these values or its own."""
        starts = torch.bincount(self.rows_N, minlength=self.num_rows).cumsum(0)
        return torch.sparse_csr_tensor(
            torch.cat([starts.new_zeros(1), starts]),
            self.columns_N,
            self.values_N if values_N is None else values_N,
            (self.num_rows, self.num_columns),
            check_invariants=False,
        )

    def transposed(self) -> tuple[Entries, Tensor]:
        """The entries of the transpose, and their indices here."""
        order_N = torch.argsort(self.columns_N, stable=True)
        return (
            Entries(
                rows_N=self.columns_N[order_N],
                columns_N=self.rows_N[order_N],
                values_N=self.values_N[order_N],
                num_rows=self.num_columns,
                num_columns=self.num_rows,
            ),
            order_N,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The result of a step."""

    gradients: Weights
    threshold: float
    """The smallest activation that was selected."""
    error: float
    """Mean squared error per number; about the fraction of variance unexplained, since activations are scaled to variance 1."""
    fired_F: Tensor
    """Which atoms were active."""


def batch_topk(z_TF: Tensor, k: int, guess: float) -> Entries:
    """The T * k largest positive entries of the whole batch; including all ties with the last; fewer if fewer are positive.

    ``guess``: the expected limit. It affects how many entries are examined, not which are selected.
    """
    wanted = k * len(z_TF)
    found = (z_TF > max(guess, 0.0)).nonzero()
    if len(found) < wanted and guess > 0:
        found = (z_TF > 0).nonzero()
    rows_N, columns_N = found.unbind(1)
    values_N = z_TF[rows_N, columns_N]
    if len(values_N) > wanted:
        kept_N = values_N >= values_N.kthvalue(len(values_N) - wanted + 1).values
        rows_N, columns_N, values_N = rows_N[kept_N], columns_N[kept_N], values_N[kept_N]
    return Entries(rows_N=rows_N, columns_N=columns_N, values_N=values_N, num_rows=len(z_TF), num_columns=z_TF.shape[1])


def train_step(weights: Weights, x_TD: Tensor, k: int, guess: float, dead_F: Tensor, aux_weight: float) -> StepResult:
    """Gradients of mean (x - decode(encode(x)))^2 + aux_weight * the auxiliary loss, for one batch of scaled activations.

    The auxiliary loss (AuxK, arXiv 2406.04093) lets the D / 2 dead atoms closest to firing on a token reconstruct the
    residual error, relative to the size of that error.
    """
    input_TD = x_TD - weights.b_dec_D
    z_TF = torch.addmm(weights.b_enc_F, input_TD, weights.W_enc_DF)
    entries = batch_topk(z_TF, k, guess)
    residual_TD = input_TD - entries.csr() @ weights.W_dec_FD
    error = float(residual_TD.square().mean())
    slope_TD = residual_TD * (-2 / residual_TD.numel())
    gradients = Weights(**{name: torch.zeros_like(tensor) for name, tensor in weights.fields().items()})
    gradients.b_dec_D += slope_TD.sum(0)
    _add_gradients(gradients, weights, entries, slope_TD, input_TD)
    if aux_weight > 0 and bool(dead_F.any()):
        aux = _nearest(z_TF, dead_F.nonzero().squeeze(1), max(1, x_TD.shape[1] // 2))
        left_TD = residual_TD - aux.csr() @ weights.W_dec_FD
        slope_TD = left_TD * (-2 * aux_weight / max(error, 1e-12) / left_TD.numel())
        _add_gradients(gradients, weights, aux, slope_TD, input_TD)
    gradients.b_dec_D -= weights.W_enc_DF @ gradients.b_enc_F  # b_dec also shifts the encoder's input
    fired_F = torch.zeros_like(dead_F)
    fired_F[entries.columns_N] = True
    return StepResult(
        gradients=gradients,
        threshold=float(entries.values_N.min()) if len(entries.values_N) else 0.0,
        error=error,
        fired_F=fired_F,
    )


def _nearest(z_TF: Tensor, ids_M: Tensor, count: int) -> Entries:
    """Per token, the largest entries among some atoms, negative ones too: an atom far from firing must get a gradient."""
    top_TK, places_TK = z_TF[:, ids_M].topk(min(count, len(ids_M)), dim=-1)
    columns_TK, order_TK = ids_M[places_TK].sort(dim=-1)
    rows_T = torch.arange(len(z_TF), device=z_TF.device)
    return Entries(
        rows_N=rows_T.repeat_interleave(columns_TK.shape[1]),
        columns_N=columns_TK.flatten(),
        values_N=top_TK.gather(-1, order_TK).flatten(),
        num_rows=len(z_TF),
        num_columns=z_TF.shape[1],
    )


def _add_gradients(gradients: Weights, weights: Weights, entries: Entries, slope_TD: Tensor, input_TD: Tensor) -> None:
    """Gradients of W_dec, W_enc and b_enc through the given activations, from the gradient of the loss by the reconstruction."""
    by_atom, order_N = entries.transposed()
    gradients.W_dec_FD += by_atom.csr() @ slope_TD
    # The gradient of an entry is the dot product of its token's gradient and its atom; only needed at the non-zero entries.
    pattern = entries.csr(torch.zeros_like(entries.values_N))
    slopes_N = torch.sparse.sampled_addmm(pattern, slope_TD, weights.W_dec_FD.T, beta=0.0).values()
    gradients.W_enc_DF += (by_atom.csr(slopes_N[order_N]) @ input_TD).T
    gradients.b_enc_F.index_add_(0, entries.columns_N, slopes_N)
