"""A plan written into a model's files, exactly: bake, check, take back. Works on the files alone."""

from moe_steer.baking.baker import bake, unbake
from moe_steer.baking.planning import Certificate, EntryCertificate
from moe_steer.baking.record import BakeMismatch
from moe_steer.baking.verification import Verification, verify_bake

__all__ = ["BakeMismatch", "Certificate", "EntryCertificate", "Verification", "bake", "unbake", "verify_bake"]
