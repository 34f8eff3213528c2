"""``moe-steer bake``: a plan written into a checkpoint, or into a GGUF file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_steer.plan import SteeringPlan


@dataclass(frozen=True, kw_only=True)
class Bake:
    """Write a plan into a checkpoint, so that any engine serves the steered model at no cost."""

    model: str
    """A model folder (config.json and safetensors), 'lab' or 'lab-dense' for an embedded model, or a GGUF file."""
    plan: str
    """Plan file (JSON)."""
    out: str | None = None
    """Folder (or GGUF file) to write; it must not exist."""
    overlay: bool = False
    """Put the changed tensors into a small shard of their own instead of rewriting the shards that hold them."""
    copy: bool = False
    """Copy what does not change instead of hard-linking it."""
    symlink: bool = False
    """Point to unchanged shards by symbolic links: the source must stay where it is."""
    round: bool = False
    """Where a number format holds only powers of two, take the nearest one."""
    hash_all: bool = False
    """Hash unchanged shards too, however large, so that 'verify' needs no source."""
    in_place: bool = False
    """GGUF: change the file itself, under a journal."""
    control_vector: str | None = None
    """Write the plan's residual vectors to this GGUF control vector instead of baking them."""

    def run(self) -> int:
        """Bake and show the certificate."""
        plan = SteeringPlan.load(self.plan)
        if self.model.endswith(".gguf"):
            return self._gguf(plan)
        if self.in_place:
            raise ValueError("--in-place is for GGUF files: a checkpoint is baked into a new folder, give --out")
        if self.control_vector is not None:
            plan = self._export(plan)
            if not plan.active_experts and self.out is None:
                return 0
        if self.out is None:
            raise ValueError("give --out, the folder to write")
        from moe_steer.baking import bake

        options: dict[str, Any] = {"copy": self.copy, "symlink": self.symlink, "hash_all": self.hash_all}
        certificate = bake(
            model_folder(self.model), plan, self.out, overlay=self.overlay, round_gains=self.round, **options
        )
        print(certificate.summary())
        print(
            f"wrote {self.out}: {certificate.changed_tensors} tensors changed, {len(certificate.files_written)} files written "
            f"({certificate.bytes_written:,} bytes, and {(Path(self.out) / 'steering.json').stat().st_size:,} of steering.json), "
            f"{'no shard linked' if self.copy else 'the rest linked'}"
        )
        print(f"next: moe-steer verify --baked {self.out} --model {self.model} --forward")
        return 0

    def _export(self, plan: SteeringPlan) -> SteeringPlan:
        """Write the vectors and return the plan without them."""
        from moe_steer.bake_gguf import export_control_vector

        assert self.control_vector is not None
        export_control_vector(dataclasses.replace(plan, experts=()), self.control_vector)
        print(f"wrote {self.control_vector}: {len(plan.active_residual)} residual vectors (llama.cpp --control-vector)")
        return dataclasses.replace(plan, residual=())

    def _gguf(self, plan: SteeringPlan) -> int:
        for name in ("overlay", "symlink", "hash_all"):
            if getattr(self, name):
                raise ValueError(
                    f"--{name.replace('_', '-')} is for checkpoint folders, and {self.model} is a GGUF file"
                )
        if plan.active_residual and self.control_vector is None:
            raise ValueError(
                f"a GGUF model has no place for the plan's {len(plan.active_residual)} residual vectors: give --control-vector FILE to write them beside it"
            )
        if self.control_vector is not None and not plan.active_experts and self.out is None and not self.in_place:
            self._export(plan)
            return 0
        if self.in_place == (self.out is not None):
            raise ValueError(
                "give either --out, the GGUF file to write, or --in-place" + (", not both" if self.in_place else "")
            )
        from moe_steer.bake_gguf import bake_gguf

        certificate = bake_gguf(
            self.model,
            plan,
            self.out,
            self.in_place,
            round_gains=self.round,
            copy=self.copy,
            control_vector=self.control_vector,
        )
        # A split model's parts have names of their own: the one to load is the first.
        written = Path(self.out or self.model).with_name(certificate["files"][0]["name"])
        parts = len(certificate["files"])
        print(
            f"{certificate['verdict']}: {len(certificate['slices'])} slices changed in {written}"
            + (f" (the first of {parts} files)" if parts > 1 else "")
        )
        for piece in certificate["slices"]:
            if piece["gain"] != piece["asked"]:
                print(
                    f"  layer {piece['layer']} expert {piece['expert']}: {piece['asked']:g} asked, {piece['gain']:g} baked"
                )
        print(f"  bound: {certificate['bound']:.3g} ({certificate['bound_of']})")
        print(f"  undo: {certificate['undo'].replace('NAME', written.name)}")
        vector = certificate["control_vector"]
        if vector is not None:
            print(
                f"  control vector: {self.control_vector}, layers {', '.join(map(str, vector['layers']))}; serve with"
            )
            print(f"    llama-server --model {written} --control-vector {self.control_vector}")
        for note in certificate["notes"]:
            print(f"  note: {note}")
        against = "" if self.in_place else f" --model {self.model}"
        print(f"next: moe-steer verify --baked {written}{against}")
        return 0


def model_folder(name: str) -> str:
    """The folder of an embedded model; any other name is a folder already."""
    from moe_steer.lab import EMBEDDED

    return str(EMBEDDED[name]) if name in EMBEDDED and not Path(name).exists() else name
