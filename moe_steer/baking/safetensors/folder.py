"""What a checkpoint folder says before anything is planned: its tensors, by the headers of its safetensors files alone (8 bytes of length, JSON,
data); and by config.json its family, which may be baked or not and why, and the shape a plan is checked against.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_steer.backends.shard_index import SINGLE_FILE, contradiction
from moe_steer.baking.edits import Container, StoredTensor
from moe_steer.baking.folder_files import INDEX_SUFFIX
from moe_steer.baking.numbers import Rounding, scale_floats
from moe_steer.baking.safetensors.layouts import LayerPlaces, count_experts
from moe_steer.files import read_weight_map, tensor_places
from moe_steer.json_files import quoted, read_json

_VERIFIED = """
    afmoe aria aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_ocr2 deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 dots1 ernie4_5_moe exaone_moe flex_olmo flint gemma4 gemma4_text glm4_moe glm4_moe_lite glm4v_moe glm5_next
    glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3 hy_v4 inkling_text
    jamba kimi_k2 kimi_k25 kimi_linear kolibri1 laguna lfm2_moe longcat_flash mellum mimo_v2_flash minimax minimax_m2
    minimax_m3_vl minimax_m3_vl_text mistral4 mistral_large4 mixtral nemotron_h olmoe phimoe qwen2_moe qwen3_5_moe
    qwen3_5_moe_text qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen3_vl_moe qwen3_vl_moe_text qwen4_exp qwen4_exp_text
    solar_open step3p7 unlimited_ocr
    dots3_note_text hy_v4_vl hy_v4_vl_text inkling2_loop_text inkling2_text lara_mini sarvam_mla sarvam_moe
"""
VERIFIED = frozenset(_VERIFIED.split())
"""Families whose baked checkpoints were compared with the hooked model (kimi_k2 is deepseek_v3 under another name)."""
_LLAMA4 = "the router's score scales what goes into the expert, f(s * x), so a larger output is not what the plan asks for: steer it in process"
_MUSE = "a norm follows every expert (post_expert_norm) and takes any scale away again: steer it in process"
_NOT_STEERABLE = "its routing cannot be observed or steered, so no plan can mean it"
REFUSED = {
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "muse_spark": _MUSE,
    "muse_spark_text": _MUSE,
    "jetmoe": _NOT_STEERABLE,
    "switch_transformers": _NOT_STEERABLE,
    "nllb_moe": _NOT_STEERABLE,
    "zaya": _NOT_STEERABLE,
    "ernie4_5_vl_moe": "a layer has text experts and image experts under the same numbers, so an expert id does not name one",
}
"""Families that take no plan, and why."""
_TEXT_SECTIONS = ("text_config", "thinker_config", "language_config", "llm_config")
_NUM_LAYERS_KEYS = ("num_layers", "num_hidden_layers", "n_layers", "n_layer")
_LAYER_LISTS = ("layers_block_type", "hybrid_override_pattern", "layer_types")  # one entry a layer (Nemotron-H)
_NUM_EXPERTS_KEYS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_WIDTH_KEYS = ("hidden_size", "d_model", "n_embd")


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Container):
    """A folder with config.json and safetensors files. ``index`` is the name of the index, None for a single file.

    ``repeated``: tensors that are in several shards; the index says which one counts, and not every engine asks it.
    """

    folder: Path
    config: Mapping[str, Any]
    index: str | None
    repeated: frozenset[str] = frozenset()

    def path(self, name: str) -> Path:
        """The path of a shard, or of another file of the folder."""
        return self.folder / name

    def scale(self, piece: bytes, dtype: str, factor: float, divide: bool) -> tuple[bytes, Rounding]:
        """Plain numbers times ``factor``, or divided by it."""
        return scale_floats(piece, dtype, factor, divide=divide)


def open_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read config, index and every header. ValueError says which file is missing, incomplete or contradicts another."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(
            f"there is no model folder {os.fspath(folder)!r}: give a folder with config.json and safetensors"
        )
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{os.fspath(folder)!r} holds an adapter, of which no change of the weights beside it takes account: merge it into its model first "
            "(peft: merge_and_unload, save_pretrained), or, where these weights have it, remove adapter_config.json"
        )
    missing = f"{path / 'config.json'} is missing: give the folder of a checkpoint in the transformers format"
    types = {"model_type": str | None}
    config = read_json(path / "config.json", "fetch it again", types, missing, endless=True)
    index, weight_map = _weight_map(path)
    shards = tuple(sorted(set(weight_map.values()))) if index else (SINGLE_FILE,)
    headers = {shard: read_header(path / shard) for shard in shards}
    if index and (found := contradiction(path, weight_map, headers)):
        raise ValueError(f"{path / found[0]} is not what {index} says ({found[1]}): fetch the checkpoint again")
    tensors = {name: headers[shard][name] for name, shard in weight_map.items()} if index else headers[SINGLE_FILE]
    repeated: frozenset[str] = frozenset()
    if sum(map(len, headers.values())) > len(tensors):
        counts = Counter(name for header in headers.values() for name in header)
        repeated = frozenset(name for name, count in counts.items() if count > 1)
    paths = {shard: path / shard for shard in shards}
    return Checkpoint(folder=path, config=config, index=index, paths=paths, tensors=tensors, repeated=repeated)


def open_shard(path: Path) -> Checkpoint:
    """One safetensors file by itself."""
    return Checkpoint(folder=path.parent, config={}, index=None, paths={path.name: path}, tensors=read_header(path))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Tensors of one safetensors file by name; ValueError when the header or the file's length is wrong."""
    try:
        places = tensor_places(path)
    except FileNotFoundError:
        raise ValueError(f"the shard {path} is missing: fetch the rest of the checkpoint") from None
    except OSError as error:
        raise ValueError(f"the shard {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is incomplete or damaged ({error}): fetch it again") from None
    return {name: StoredTensor(name, path.name, *place) for name, place in places.items()}


def _weight_map(folder: Path) -> tuple[str | None, dict[str, str]]:
    indices = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(INDEX_SUFFIX))
    single = (folder / SINGLE_FILE).is_file()
    if len(indices) + single > 1:
        raise ValueError(
            f"{folder} holds several checkpoints ({', '.join(indices + [SINGLE_FILE] * single)}): leave one, so that all engines load the same"
        )
    if single:
        return None, {}
    if not indices:
        raise ValueError(
            f"{folder} holds neither {SINGLE_FILE} nor *{INDEX_SUFFIX}: convert the weights to safetensors"
        )
    return indices[0], read_weight_map(folder / indices[0])


@dataclass(frozen=True, kw_only=True)
class CheckpointShape:
    """What a plan is checked against, with the attributes of ``moe_steer.layers.ModelShape`` that the check reads."""

    model_type: str
    text_type: str
    num_layers: int
    num_experts: int
    moe_layers: tuple[int, ...]
    hidden_size: int
    zero_experts: int

    @property
    def is_verified(self) -> bool:
        """Whether the family is in the table."""
        return self.model_type in VERIFIED or self.text_type in VERIFIED


def text_section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of config.json that describes the text decoder."""
    for key in _TEXT_SECTIONS:
        inner = config.get(key)
        if isinstance(inner, Mapping) and (_first(inner, _NUM_LAYERS_KEYS) or any(k in inner for k in _TEXT_SECTIONS)):
            return text_section(inner)
    return config


def refuse_family(config: Mapping[str, Any]) -> None:
    """ValueError for a family that takes no plan."""
    for model_type in (config.get("model_type"), text_section(config).get("model_type")):
        if model_type in REFUSED:
            raise ValueError(f"{model_type} cannot be baked: {REFUSED[model_type]}")


def checkpoint_shape(config: Mapping[str, Any], layers: Mapping[int, LayerPlaces]) -> CheckpointShape:
    """The shape, from config.json, checked against the tensors; ValueError where the two contradict each other.

    Layers beyond the decoder's, such as those of multi-token prediction, do not count.
    """
    text = text_section(config)
    num_layers = _first(text, _NUM_LAYERS_KEYS) or next((len(text[key]) for key in _LAYER_LISTS if text.get(key)), 0)
    if not num_layers:
        raise ValueError("config.json does not say how many layers the model has: num_hidden_layers is missing")
    moe_layers = tuple(sorted(layer for layer in layers if layer < num_layers))
    stated = _first(text, _NUM_EXPERTS_KEYS) or _first(text.get("ffn_config"), _NUM_EXPERTS_KEYS)
    counts = {layer: count for layer in moe_layers if (count := count_experts(layers[layer])) is not None}
    if stated:
        for layer, count in counts.items():
            if count != stated:
                raise ValueError(
                    f"config.json says {quoted(stated)} experts, and layer {layer} has tensors of {count}: one of them is wrong"
                )
    zero = _first(text, ("zero_expert_num",))
    model_type = str(config.get("model_type") or "")
    return CheckpointShape(
        model_type=model_type,
        text_type=str(text.get("model_type") or model_type),
        num_layers=num_layers,
        num_experts=(stated or max(counts.values(), default=0)) + zero if moe_layers else 0,
        moe_layers=moe_layers,
        hidden_size=_first(text, _WIDTH_KEYS),
        zero_experts=zero,
    )


def _first(section: Any, keys: tuple[str, ...]) -> int:
    """The first of the entries that is a whole number, else 0."""
    if isinstance(section, Mapping):
        for key in keys:
            value = section.get(key)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return 0
