"""Changes models at inference and knows their insides: observe routing, steer experts and the residual stream."""

from typing import TYPE_CHECKING

from moe_steer.lazy_exports import lazy_exports

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

__getattr__ = lazy_exports(__name__, _HOME)
