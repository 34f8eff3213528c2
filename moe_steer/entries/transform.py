"""What an entry does to a vector x at a place, u being its direction of length 1 and c = x . u the component of x along it.

- add       x + strength * v, the vector v in the entry's unit
- clamp     c is moved into low..high, in the entry's unit (either may be left out); ``strength`` is the share of the way (1: all)
- set       c becomes ``to``, in the entry's unit; ``strength`` as for clamp
- ablate    c becomes 0: the component is projected out; ``strength`` as for clamp
- rotate    x is turned towards u by ``strength`` degrees in the plane of both, its norm kept; it stops at u (below 0: away from it, up
  to -u)

A gate on a ramp leaves its part of the change, of a rotation its part of the angle. A strength of 0 changes nothing; an x whose
component is already where it should be stays as it is, to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Transform:
    """``unit_D``: of length 1. ``low`` and ``high``: of the component, in the units of x. ``strength``: a share, or degrees."""

    kind: str
    unit_D: Tensor
    strength: float
    low: float = -math.inf
    high: float = math.inf

    def to(self, like: Tensor) -> Transform:
        """On the device of a tensor, in its precision, or float32 where that is less."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return Transform(self.kind, self.unit_D.to(like.device, dtype), self.strength, self.low, self.high)

    def __call__(self, x: Tensor, part: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [..., D] after the transform, and the norm [...] of the change; ``part`` [..., 1]: of a gate."""
        wide = x.to(self.unit_D.dtype)
        component = (wide @ self.unit_D)[..., None]
        share = self.strength if part is None else self.strength * part.to(wide.dtype)
        if self.kind == "rotate":
            change = self._turned(wide, component, share) - wide
        else:
            change = share * (component.clamp(self.low, self.high) - component) * self.unit_D
        norm = change.norm(dim=-1)
        return torch.where(norm[..., None] > 0, (wide + change).to(x.dtype), x), norm

    def _turned(self, wide: Tensor, component: Tensor, degrees: Tensor | float) -> Tensor:
        rest = wide - component * self.unit_D
        across = rest.norm(dim=-1, keepdim=True)
        angle = torch.atan2(across, component)
        turned = (angle - degrees * (math.pi / 180)).clamp(0.0, math.pi)
        norm = wide.norm(dim=-1, keepdim=True)
        new = norm * (turned.cos() * self.unit_D + turned.sin() * rest / across.clamp(min=torch.finfo(wide.dtype).tiny))
        # What lies along the direction already has no plane to turn in.
        still = (across == 0) | (turned == angle)
        return torch.where(still, wide, new)
