"""Changes models at inference and knows their insides: observe routing, steer experts and the residual stream."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_steer.baking import bake, unbake, verify_bake
    from moe_steer.directions import Direction
    from moe_steer.loading import load_model
    from moe_steer.observe import observe_residual, observe_routing
    from moe_steer.plan import ExpertGain, ResidualVector, SteeringPlan
    from moe_steer.steering import steer

_HOME = {
    "Direction": "directions",
    "SteeringPlan": "plan",
    "ExpertGain": "plan",
    "ResidualVector": "plan",
    "steer": "steering",
    "observe_routing": "observe",
    "observe_residual": "observe",
    "load_model": "loading",
    "bake": "baking",
    "verify_bake": "baking",
    "unbake": "baking",
}
__all__ = [
    "Direction",
    "ExpertGain",
    "ResidualVector",
    "SteeringPlan",
    "bake",
    "load_model",
    "observe_residual",
    "observe_routing",
    "steer",
    "unbake",
    "verify_bake",
]


def __getattr__(name: str) -> Any:
    """Import on first use, so that reading a plan does not import transformers."""
    if name not in _HOME:
        raise AttributeError(f"module 'moe_steer' has no attribute {name!r}")
    value = getattr(import_module(f"moe_steer.{_HOME[name]}"), name)
    globals()[name] = value
    return value
