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
    "Direction": "moe_steer.directions",
    "ExpertGain": "moe_steer.plan",
    "ResidualVector": "moe_steer.plan",
    "SteeringPlan": "moe_steer.plan",
    "bake": "moe_steer.baking",
    "load_model": "moe_steer.loading",
    "observe_residual": "moe_steer.observe",
    "observe_routing": "moe_steer.observe",
    "steer": "moe_steer.steering",
    "unbake": "moe_steer.baking",
    "verify_bake": "moe_steer.baking",
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
