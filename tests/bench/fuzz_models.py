"""What the fuzzer breaks among files of models and numbers: checkpoints, SAEs, directions, counts, GGUF files, bakes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import sae_files
from bake_checkpoints import QWEN_CONFIG, gains, qwen
from fuzz import Target, command
from fuzz_judge import Judge, Rules, anything, held, json_judge, safetensors_judge
from fuzz_mutations import Mutate, mutate_bytes, mutate_header, mutate_json, mutate_safetensors
from gguf_files import write_gguf
from stats_helpers import random_counts

NONE = type(None)
WHATEVER = Rules(optional=frozenset({"*"}), unknown=True, endless=True, free=frozenset(QWEN_CONFIG))


def model_targets(home: Path) -> list[Target]:
    """All of them, their examples written below a folder."""
    return [*_numbers(home), *_checkpoints(home), *_saes(home), *_baked(home)]


def _numbers(home: Path) -> list[Target]:
    from expert_stats import RoutingCounts
    from expert_stats.causes import Causes
    from expert_stats.rivals import Measures
    from moe_steer.direction import Direction
    from moe_steer.directions import import_easyedit, import_gguf
    from moe_steer.gates import Probe
    from moe_steer.gguf import export_residual
    from moe_steer.plan import ResidualVector, SteeringPlan
    from moe_steer.saes.training_state import TrainingState, TrainRecipe, load_state, save_state
    from moe_steer.saes.training_step import Weights

    counts, directions, foreign, training = (home / name for name in ("counts", "direction", "foreign", "training"))
    random_counts(2).save(counts / "c.safetensors")
    head = {"model": {"model_type": "x", "num_layers": 4}, "residual_norm": 3.5, "norm": 1.0}
    direction = Direction(vector_D=torch.arange(6.0), layer=2, method="caa", header=head)
    direction.save(directions / "d.safetensors")
    foreign.mkdir()
    torch.save(torch.arange(6.0), foreign / "layer_2.pt")
    export_residual(SteeringPlan(residual=[ResidualVector(2, vector=direction)]), foreign / "v.gguf", "x")
    recipe = TrainRecipe(width=8, k=2, steps=5)
    weights = Weights(
        W_enc_DF=torch.ones(4, 8), b_enc_F=torch.zeros(8), W_dec_FD=torch.ones(8, 4), b_dec_D=torch.zeros(4)
    )
    state = TrainingState(weights=weights, idle_F=torch.zeros(8, dtype=torch.int64), scale=0.5, step=2)
    for parameter in weights.fields().values():
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        state.optimizer.state[parameter] = {**moments, "step": torch.tensor(2.0)}
    training.mkdir()
    save_state(training / "state.safetensors", state, recipe)
    origin = Rules(
        free=frozenset({"model", "norm", "residual_norm", "method", "site"}),
        optional=frozenset({"model", "norm", "residual_norm"}),
        unknown=True,
        lowest={"layer": 0},
    )
    signature = Rules(
        free=frozenset({"versions"}),
        names=frozenset({"versions"}),
        optional=frozenset(
            {
                "base",
                "prompt_tail",
                "routers",
                "counted",
                "hidden_size",
                "name",
                "model_type",
                "num_layers",
                "forms",
                "tokenizer",
                "whole_words",
                "position",
                "token",
                "repeats",
                "coefficients",
            }
        ),
        unknown=True,
        also=dict.fromkeys(("coefficients", "", "tokenizer"), (NONE, int, float, str)),
    )
    progress = Rules(lowest={"step": 0})
    model = {"model_type": "x", "num_layers": 3, "num_experts": 4, "moe_layers": [1, 2]}
    table_PLE, ones_P = np.ones((2, 2, 4)), np.ones(2)
    causes, measures, probes = (home / name for name in ("causes", "measures", "probe"))
    Causes(
        model=model, outcome={"kind": "tokens"}, wanted="higher", problems=("p0", "p1"), value_P=ones_P, gradient_PLE=table_PLE,
        selected_LE=np.ones((2, 4), np.int64),
    ).save(causes / "causes.json")  # fmt: skip
    Measures(
        model=model, problems=("p0", "p1"), families=("", ""), tokens_P=ones_P, selected_PLE=table_PLE, sums={"weight": table_PLE}
    ).save(measures / "m.safetensors")  # fmt: skip
    Probe(weight_D=torch.arange(8.0), bias=0.5, layer=1, threshold=0.7, header={"labels": "x"}).save(
        probes / "p.safetensors"
    )
    beside = Rules(free=frozenset({"tables", "model", "outcome"}), names=frozenset({"tables"}), lowest={"selected": 0})
    of_measures = Rules(names=frozenset({"model"}), unknown=True, free=frozenset({"model"}))
    of_probe = Rules(
        free=frozenset({"labels", "model", "split", "held_out"}),
        optional=frozenset({"labels"}),
        unknown=True,
        also={"threshold": (int,), "bias": (int,)},
        lowest={"layer": 0},
    )
    kind = mutate_safetensors
    return [
        Target(name="counts", folder=counts, file="c.safetensors", mutate=kind, read=lambda f: RoutingCounts.load(f / "c.safetensors"), judge=safetensors_judge("routing_counts", signature), share=1.5),
        Target(name="direction", folder=directions, file="d.safetensors", mutate=kind, read=lambda f: Direction.load(f / "d.safetensors"), judge=safetensors_judge("direction", origin), share=1.5),
        Target(name="easyedit", folder=foreign, file="layer_2.pt", mutate=mutate_bytes, read=lambda f: import_easyedit(f / "layer_2.pt"), judge=anything),
        Target(name="control vector", folder=foreign, file="v.gguf", mutate=mutate_header, read=lambda f: import_gguf(f / "v.gguf"), judge=anything),
        Target(name="causes", folder=causes, file="causes.json", mutate=mutate_json, read=lambda f: Causes.load(f / "causes.json").ranking(), judge=json_judge(beside), share=1.5),
        Target(name="measures", folder=measures, file="m.safetensors", mutate=kind, read=lambda f: Measures.load(f / "m.safetensors"), judge=safetensors_judge("expert_measures", of_measures)),
        Target(name="probe", folder=probes, file="p.safetensors", mutate=kind, read=lambda f: Probe.load(f / "p.safetensors"), judge=safetensors_judge("probe", of_probe)),
        Target(name="training state", folder=training, file="state.safetensors", mutate=kind, read=lambda f: load_state(f / "state.safetensors", recipe, 4, torch.device("cpu")), judge=safetensors_judge("training", progress)),
    ]  # fmt: skip


def _checkpoints(home: Path) -> list[Target]:
    from moe_steer.backends.shard_index import check_shards
    from moe_steer.baking import bake
    from moe_steer.baking.safetensors.folder import open_checkpoint
    from moe_steer.lab import LAB_MODEL

    configs, shards = home / "configs", qwen(home / "shards", num_shards=2)
    configs.mkdir()
    shutil.copy(Path(LAB_MODEL) / "config.json", configs)
    shard = "model-00001-of-00002.safetensors"

    def both(folder: Path) -> None:
        opened = open_checkpoint(folder)
        check_shards(folder)
        for tensor in opened.tensors.values():
            for _ in opened.pieces(tensor):
                pass

    def memory(folder: Path) -> str:
        return command("memory", "--model", str(folder), "--gpus", "1", "--gpu-gib", "24")

    index = Rules(
        free=frozenset({"metadata"}), names=frozenset({"weight_map"}), optional=frozenset({"metadata"}), unknown=True
    )
    return [
        Target(name="memory config.json", folder=configs, file="config.json", mutate=mutate_json, read=memory, judge=anything, share=0.6, named=(str(configs.name), "the model ", "model cannot be planned")),
        Target(name="bake config.json", folder=shards, file="config.json", mutate=mutate_json, read=lambda f: bake(f, gains((1, 2, 64.0)), Path(tempfile.mkdtemp(dir=f.parent), "b")), judge=json_judge(WHATEVER), named=("shards", "layer", "the plan")),
        Target(name="index", folder=shards, file="model.safetensors.index.json", mutate=mutate_json, read=both, judge=json_judge(index), named=("shard", "index"), share=1.5),
        Target(name="check_shards index", folder=shards, file="model.safetensors.index.json", mutate=mutate_json, read=check_shards, judge=json_judge(index), named=("weight file", "index")),
        Target(name="shard", folder=shards, file=shard, mutate=mutate_safetensors, read=both, judge=safetensors_judge(), share=1.5),
        Target(name="check_shards shard", folder=shards, file=shard, mutate=mutate_safetensors, read=check_shards, judge=safetensors_judge(), share=1.0),
    ]  # fmt: skip


def _saes(home: Path) -> list[Target]:
    from moe_steer.saes import load_sae

    made: dict[str, tuple[Callable[[Path], sae_files.Published], dict[str, Any]]] = {
        "saelens": (sae_files.saelens, {}),
        "saelens topk": (lambda root: sae_files.saelens(root, "topk"), {}),
        "saelens old": (sae_files.saelens_3, {}),
        "gemma scope": (sae_files.gemma_scope, {}),
        "gemma scope 2": (sae_files.gemma_scope_2, {}),
        "llama scope": (sae_files.llama_scope, {}),
        "llama scope r1": (sae_files.llama_scope_r1, {}),
        "qwen scope": (lambda root: sae_files.qwen_scope(root, config=True), {}),
        "dictionary learning": (sae_files.dictionary_learning, {}),
        "sparsify": (sae_files.sparsify, {}),
        "linear pair": (sae_files.qresearch, {"layer": 19, "k": 3}),
    }
    targets = []
    for name, (write, given) in made.items():
        root = home / f"sae {name}"
        root.mkdir()
        place = write(root).path.relative_to(root)

        def read(folder: Path, place: Path = place, given: dict[str, Any] = given) -> Any:
            return load_sae(folder / place, **given)

        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            mutate, judge = _of_suffix(path.suffix)
            targets.append(
                Target(name=f"sae {name} {path.name}", folder=root, file=str(path.relative_to(root)), mutate=mutate, read=read, judge=judge, named=(place.name,), share=0.5)
            )  # fmt: skip
    return targets


def _of_suffix(suffix: str) -> tuple[Mutate, Judge]:
    if suffix == ".json":
        return mutate_json, json_judge(Rules(optional=frozenset({"*"}), unknown=True, free=_FREE, also=_NULLS))
    return (mutate_safetensors, safetensors_judge()) if suffix == ".safetensors" else (mutate_bytes, anything)


_FREE = frozenset({
    "sae_lens_version", "device", "reshape_activations", "l0", "out", "expansion_factor", "trainer_class", "ctx_len", "top_k", "use_decoder_bias",
    "normalize_decoder", "dtype",
})  # fmt: skip
"""Keys that nothing reads."""
_NULLS: dict[str, tuple[type, ...]] = dict.fromkeys(
    ("k", "model_name", "d_in", "d_sae", "d_model", "metadata", "hook_name", "layer", "lm_name", "submodule_name", "activation_dim", "dict_size", "trainer", "buffer",
     "hook_point", "hook_point_layer", "num_latents", "transcode", "skip_connection", "signed", "model", "base_model", "model_type", "hf_hook_point_out", "hook_point_out",
     "activation_fn_kwargs", "finetuning_scaling_factor", "normalize_activations", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "dict_class", "type", "sae_type"),
    (NONE,),
)  # fmt: skip


def _baked(home: Path) -> list[Target]:
    from moe_steer.baking import bake, verify_bake
    from moe_steer.baking.gguf_model import read_gguf

    source, gguf, plain = qwen(home / "qwen"), home / "gguf", home / "plain gguf"
    plan = gains((1, 2, 64.0), (1, 3, 3.0))
    bake(source, plan, home / "bake" / "b", copy=True, hash_all=True)
    gguf.mkdir()
    plain.mkdir()
    bake(write_gguf(plain / "m.gguf"), plan, gguf / "b.gguf")

    def verify(name: str) -> Callable[[Path], Any]:
        return lambda folder: verify_bake(folder / name)

    def restored(folder: Path) -> Any:
        return command("verify", "--baked", f"{folder}/b.gguf")

    return [
        Target(name="gguf header", folder=plain, file="m.gguf", mutate=mutate_header, read=lambda f: read_gguf(f / "m.gguf"), judge=anything, share=2),
        Target(name="gguf baked", folder=gguf, file="b.gguf", mutate=mutate_header, read=verify("b.gguf"), judge=held),
        Target(name="gguf record", folder=gguf, file="b.gguf.steering.json", mutate=mutate_json, read=verify("b.gguf"), judge=held, named=("b.gguf", "certificate"), share=1.5),
        Target(name="gguf record flips", folder=gguf, file="b.gguf.steering.json", mutate=mutate_bytes, read=restored, judge=held, named=("b.gguf", "certificate")),
        Target(name="bake record", folder=home / "bake", file="b/steering.json", mutate=mutate_json, read=verify("b"), judge=held, share=1.5),
        Target(name="bake record flips", folder=home / "bake", file="b/steering.json", mutate=mutate_bytes, read=verify("b"), judge=held),
        Target(name="bake shard", folder=home / "bake", file="b/model.safetensors", mutate=mutate_safetensors, read=verify("b"), judge=held),
        Target(name="bake config", folder=home / "bake", file="b/config.json", mutate=mutate_json, read=verify("b"), judge=held, named=("b/config.json", "b'", "baked folder")),
    ]  # fmt: skip
