"""``moe-steer bake``: a plan written into a checkpoint, or into a GGUF file.

``moe-steer unbake``: the original back from a baked checkpoint.
``moe-steer verify``: is a baked checkpoint what it says?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.core.served.server_options import JobServerOptions
from moe_steer import SteeringPlan

if TYPE_CHECKING:
    from moe_steer.baking import Certificate
    from moe_steer.baking.record import Record


@dataclass(frozen=True, kw_only=True)
class Bake:
    """Write a plan into a checkpoint, so that any engine serves the steered model at no cost."""

    model: str
    """A model folder (config.json and safetensors), 'lab', 'lab-dense' or 'lab-search' for an embedded model, or a GGUF file."""
    plan: str
    """Plan file (JSON)."""
    out: str | None = None
    """Folder (or GGUF file) to write; it must not exist."""
    overlay: bool = False
    """Put the changed tensors into a small shard of their own instead of rewriting the shards that hold them: the old ones stay in the folder, so
    name the loader too."""
    loader: str | None = None
    """Of --overlay: how your engine reads shards, in-order (of name, one after another) or by-index; any other way serves the plain model."""
    copy: bool = False
    """Copy what does not change instead of hard-linking it."""
    symlink: bool = False
    """Point to unchanged shards by symbolic links: the source must stay where it is."""
    round: bool = False
    """Where a number format holds only powers of two, take the nearest one."""
    hash_all: bool = False
    """Hash unchanged shards too, however large, so that 'verify' needs no source."""
    control_vector: str | None = None
    """Write the plan's residual vectors to this GGUF control vector instead of baking them."""

    def run(self) -> int:
        """Bake and show the certificate."""
        plan = SteeringPlan.load(self.plan)
        if self.control_vector is not None and not plan.active_experts and not plan.top_k and self.out is None:
            from moe_steer.gguf import export_control_vector

            export_control_vector(dataclasses.replace(plan, experts=()), self.control_vector)
            self._say_vectors(plan)
            return 0
        if self.out is None:
            raise ValueError("give --out, the folder to write (for a GGUF model: the file)")
        if self.loader is not None and not self.overlay:
            raise ValueError("--loader says how an engine reads an overlay: give --overlay too, or leave it out")
        from moe_steer import bake

        certificate = bake(
            model_folder(self.model),
            plan,
            self.out,
            overlay=(self.loader or "") if self.overlay else None,
            copy=self.copy,
            symlink=self.symlink,
            round_gains=self.round,
            hash_all=self.hash_all,
            control_vector=self.control_vector,
        )
        if certificate.parts:
            self._say_gguf(plan, certificate, Path(self.out).with_name(certificate.parts[0]))
        else:
            self._say_checkpoint(plan, certificate, self.out)
        return 0

    def _say_vectors(self, plan: SteeringPlan) -> None:
        print(f"wrote {self.control_vector}: {len(plan.active_residual)} residual vectors (llama.cpp --control-vector)")

    def _say_checkpoint(self, plan: SteeringPlan, certificate: Certificate, out: str) -> None:
        if self.control_vector is not None:
            self._say_vectors(plan)
        print(certificate.summary())
        print(
            f"wrote {out}: {certificate.changed_tensors} tensors changed, {len(certificate.files_written)} files written "
            f"({certificate.bytes_written:,} bytes, and {(Path(out) / 'steering.json').stat().st_size:,} of steering.json), "
            f"{'no shard linked' if self.copy else 'the rest linked'}"
        )
        vectors = f" --plan {self.plan}" if plan.active_residual else ""  # whose files are not in the baked folder
        print(f"next: moe-steer verify --baked {out} --model {self.model} --forward{vectors}")

    def _say_gguf(self, plan: SteeringPlan, certificate: Certificate, first: Path) -> None:
        """``first``: the file to load, whose name differs from --out where the model is in several parts."""
        from moe_steer.baking.gguf_record import BOUND_OF, undo_words

        parts = len(certificate.parts)
        print(
            f"{certificate.verdict_words}: {certificate.changed_tensors} slices changed in {first}"
            + (f" (the first of {parts} files)" if parts > 1 else "")
        )
        for entry in certificate.entries:
            if entry.applied != entry.gain:
                print(f"  layer {entry.layer} expert {entry.expert}: {entry.gain:g} asked, {entry.applied:g} baked")
        print(f"  bound: {certificate.bound:.3g} ({BOUND_OF})")
        print(f"  undo: {undo_words(certificate)}")
        if self.control_vector is not None:
            layers = ", ".join(map(str, sorted({entry.layer for entry in plan.active_residual})))
            print(f"  control vector: {self.control_vector}, layers {layers}; serve with")
            print(f"    llama-server --model {first} --control-vector {self.control_vector}")
        for note in certificate.notes:
            print(f"  note: {note}")
        print(f"next: moe-steer verify --baked {first} --model {self.model}")


def model_folder(name: str) -> str:
    """The folder of an embedded model; any other name is a folder already."""
    from moe_steer.lab import EMBEDDED

    return str(EMBEDDED[name].folder) if name in EMBEDDED and not Path(name).exists() else name


@dataclass(frozen=True, kw_only=True)
class Unbake:
    """Take a bake back: the original checkpoint bit for bit, proven by hashes, or a refusal that says why not."""

    baked: str
    """The baked folder, or a GGUF file (which is restored in place)."""
    out: str | None = None
    """Folder to write the original to; it must not exist."""
    copy: bool = False
    """Copy what does not change instead of hard-linking it."""
    symlink: bool = False
    """Point to unchanged shards by symbolic links."""

    def run(self) -> int:
        """Restore and say what was restored."""
        from moe_steer.baking import unbake

        record = unbake(self.baked, self.out, copy=self.copy, symlink=self.symlink)
        if self.out is None:
            print(f"{self.baked} is what it was before the bake")
            return 0
        print(f"wrote {self.out}: {len(record.changes)} tensors have the hashes they had before the bake")
        if record.left_out:
            print(f"{len(record.left_out)} files in other formats had been left out by the bake and are not there")
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify(JobServerOptions):
    """Check a baked checkpoint: hashes, every byte against the source, with --forward what the models compute, and with --endpoint
    what a running server does."""

    baked: str | None = None
    """The baked folder or GGUF file; with --endpoint the one that is served, or leave it out for a plan that requests name."""
    model: str | None = None
    """The original: compares every byte, and applies the edits again; of a GGUF file with --endpoint the folder it was made from."""
    forward: bool = False
    """Load both, steer the original, and compare logits and greedy tokens."""
    prompts: str | None = None
    """Text file with one prompt a line for --forward and --endpoint; default five problems."""
    plan: str | None = None
    """Plan file for --forward and --endpoint, if the plan has residual vectors or nothing was baked; default the plan in
    steering.json."""
    max_new_tokens: int = 32
    """Greedy tokens to compare after each prompt."""
    dtype: str = "auto"
    """Type to compute in for --forward: auto (as stored), float32, bfloat16 or float16."""
    experts_implementation: str | None = None
    """How the library runs experts: eager, batched_mm or grouped_mm; default eager, whose sums do not depend on the layout."""

    def run(self) -> int:
        """Check, and say what was checked."""
        if self.endpoint:
            return self._endpoint()
        if self.baked is None:
            raise ValueError("give --baked, the folder or GGUF file to check, or --endpoint, the server")
        if self.forward and self.baked.endswith(".gguf"):
            raise ValueError("--forward is for checkpoint folders: compare GGUF models with llama.cpp")
        if self.forward and self.model is None:
            raise ValueError("--forward needs --model, the original checkpoint")
        from moe_steer import verify_bake

        source = model_folder(self.model) if self.model is not None else None
        found = verify_bake(self.baked, source)
        if found.certificate.parts:
            print(
                f"{found.certificate.verdict_words}: {found.tensors} changed slices are as they were baked, {found.hashed} of {found.files} files "
                f"by hash, {found.compared_bytes:,} bytes compared with the source"
            )
            return 0
        print(f"{found.files} files and {found.tensors} changed tensors are as they were baked")
        if source is not None:
            print(f"everything else is byte for byte that of {self.model}")
        if found.unhashed:
            print(
                f"{len(found.unhashed)} large linked shards have no hash and were checked by size and time: give --model to compare them"
            )
        print(found.certificate.summary())
        if self.forward and source is not None:
            self._forward(source)
        return 0

    def _forward(self, source: str) -> None:
        from moe_steer.baking.forward import applied_plan, compare_forward
        from moe_steer.baking.record import read_record

        assert self.baked is not None
        record = read_record(self.baked)
        plan = self._plan_of(record)
        options = {"dtype": self.dtype}
        if self.experts_implementation is not None:
            options["experts_implementation"] = self.experts_implementation
        applied = applied_plan(plan, record.certificate)
        result = compare_forward(self.baked, source, applied, self._prompts(), self.max_new_tokens, **options)
        print(
            f"{result.prompts} prompts in {result.dtype}: largest logit difference {result.worst:.2e} (relative {result.relative:.2e}), "
            f"{result.same_tokens} of {result.tokens} greedy tokens agree"
        )
        if result.silent:
            print(f"no prompt reached {', '.join(result.silent)}: this says nothing about them")
        result.check(record.certificate)

    def readers(self) -> Set[str]:
        """What options may be for."""
        return {"endpoint"} if self.endpoint else set()

    def _plan_of(self, record: Record) -> SteeringPlan:
        """The plan that was baked, with its vectors."""
        if record.plan.active_residual and self.plan is None:
            raise ValueError("the plan has residual vectors, whose files are not in the baked folder: give --plan")
        plan = SteeringPlan.load(self.plan) if self.plan else record.plan
        if plan.digest() != record.plan_digest:
            raise ValueError(f"{self.plan} is not the plan that was baked: give --plan with the file that was")
        return plan

    def _prompts(self) -> tuple[str, ...]:
        from moe_steer.baking.forward import PROMPTS

        if self.prompts is None:
            return PROMPTS
        from launch.core.wiring import text_lines

        return tuple(text_lines(self.prompts))

    def _endpoint(self) -> int:
        """Ask the server, and hold its answers against the model here."""
        if self.model is None or (self.baked is None and self.plan is None):
            raise ValueError(
                "--endpoint needs --model, the plain model to compare with, and what should be served: --baked, or --plan for a plan "
                "that requests name"
            )
        if self.forward:
            raise ValueError("--forward compares with the baked folder, and --endpoint with the server: leave one out")
        from launch.core.served.checking import check_endpoint
        from launch.core.served.connection import Connection
        from moe_steer import load_model
        from moe_steer.baking.forward import applied_plan
        from moe_steer.baking.verification import read_bake

        if self.baked is None:
            plan = SteeringPlan.load(str(self.plan))
        else:
            record, _ = read_bake(self.baked)
            plan = applied_plan(self._plan_of(record), record.certificate)
        options: dict[str, Any] = {"dtype": self.dtype}
        if self.experts_implementation is not None:
            options["experts_implementation"] = self.experts_implementation
        connection = Connection.to(self)
        print(connection.line)
        if self.baked is None:
            connection.refuse_missing({str(self.plan): plan}, self.model, str(self.plan))
        model, tokenizer = load_model(self.model, **options)
        plan.check(model)
        asked = connection.asked(plan if self.baked is None else None)
        found = check_endpoint(connection, model, tokenizer, plan, self._prompts(), self.max_new_tokens, asked)
        found.check()
        print(f"the server serves the steered model: {found.line}")
        if found.warning:
            print(f"WARNING: {found.warning}")
        return 0
