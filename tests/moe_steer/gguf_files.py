"""Small GGUF files for the tests, written by the ``gguf`` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from moe_steer.baking.gguf_model import BLOCK_FORMATS

TYPES = gguf.GGMLQuantizationType.__members__
NUM_LAYERS, NUM_EXPERTS, WIDTH, INNER = 3, 4, 8, 512  # the first layer is dense
QUANTISABLE = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")


def quantised(type_name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Row bytes [..., bytes]: by the package's quantiser, else random codes with scales of a usual size."""
    generator = np.random.default_rng(seed)
    if type_name in QUANTISABLE:
        values = _away_from_zero(generator.standard_normal(shape) * 0.1, 0.01).astype(np.float32)
        return gguf.quants.quantize(values, TYPES[type_name]).view(np.uint8)
    form = BLOCK_FORMATS[type_name]
    blocks_NB = generator.integers(0, 256, (int(np.prod(shape)) // form.num_values, form.num_bytes), dtype=np.uint8)
    scales_NF = _away_from_zero(generator.standard_normal((len(blocks_NB), len(form.offsets))) * 0.01, 0.001)
    return form.write(blocks_NB, scales_NF).reshape(*shape[:-1], -1)


def _away_from_zero(values: np.ndarray, least: float) -> np.ndarray:
    """So that a gain of 1/4 leaves no float16 below its normal range: tests of that make their own numbers."""
    return values + np.copysign(least, values)


def dequantised(raw: np.ndarray, type_name: str) -> np.ndarray:
    """float32 values of row bytes, by the package's dequantiser."""
    if type_name in ("F32", "F16"):
        raw = np.ascontiguousarray(raw).view({"F32": np.float32, "F16": np.float16}[type_name])
        return raw.astype(np.float32)
    return gguf.quants.dequantize(np.ascontiguousarray(raw), TYPES[type_name])


def write_gguf(
    path: Path,
    type_name: str = "F32",
    arch: str = "deepseek2",
    *,
    bias: bool = False,
    scale: bool = False,
    expert_count: int | None = NUM_EXPERTS,
    extra: dict[str, np.ndarray] | None = None,
    split: int = 0,
    seed: int = 0,
) -> Path:
    """A model of one dense layer and two with experts; ``split``: tensors a part. Returns the (first) file's path."""
    writer: Any = gguf.GGUFWriter(str(path), arch, split_max_tensors=split)
    writer.add_name("tiny")
    writer.add_block_count(NUM_LAYERS)
    writer.add_embedding_length(WIDTH)
    if expert_count is not None:
        writer.add_expert_count(expert_count)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}" for i in range(20)])
    generator = np.random.default_rng(seed + 100)

    def plain(name: str, *shape: int) -> None:
        writer.add_tensor(name, generator.standard_normal(shape).astype(np.float32))

    plain("token_embd.weight", 20, WIDTH)
    plain("blk.0.ffn_down.weight", WIDTH, INNER)
    for layer in range(1, NUM_LAYERS):
        prefix = f"blk.{layer}"
        plain(f"{prefix}.ffn_gate_inp.weight", NUM_EXPERTS, WIDTH)
        raw = quantised(type_name, (NUM_EXPERTS, WIDTH, INNER), seed + layer)
        writer.add_tensor(f"{prefix}.ffn_down_exps.weight", raw, raw_dtype=TYPES[type_name])
        if bias:
            plain(f"{prefix}.ffn_down_exps.bias", NUM_EXPERTS, WIDTH)
        if scale:
            plain(f"{prefix}.ffn_down_exps.scale", NUM_EXPERTS)
        plain(f"{prefix}.ffn_down_shexp.weight", WIDTH, INNER)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))[0]


def write_model(
    path: Path, model: Any, tokenizer: Any, type_name: str = "F32", arch: str = "qwen2", **changed: np.ndarray | None
) -> Path:
    """A dense model of the library (qwen2 or llama) with its byte-level tokenizer and chat template, as a converter writes it.

    ``changed``: the file's tensors that are others than the model's, or None for those that are left out.
    """
    config = model.config
    writer: Any = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(
        next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if arch == "llama" and name.endswith(
            ("q_proj.weight", "k_proj.weight")
        ):  # llama.cpp rotates neighbours, not halves
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        kind = TYPES[type_name if values.ndim > 1 else "F32"]
        raw = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        found = names.get_name(name, (".weight", ".bias"))
        if found not in changed:
            writer.add_tensor(found, raw, raw_dtype=kind)
    for found, values in changed.items():
        if values is not None:
            writer.add_tensor(found, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, tokenizer: Any) -> None:
    written = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {entry["id"]: entry for entry in written["added_tokens"]}
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([words[number] for number in range(len(words))])
    control, normal, own = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.USER_DEFINED
    kinds = [(control if added[n]["special"] else own) if n in added else normal for n in range(len(words))]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in written["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def certificate(first: Path) -> dict[str, Any]:
    """What the bake of a model, or of its first part, wrote beside it."""
    return dict(json.loads(first.with_name(f"{first.name}.steering.json").read_text()))


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (type, row bytes [experts or rows, ..., bytes]) of one file, by the package's reader."""
    reader = gguf.GGUFReader(str(path))
    return {item.name: (item.tensor_type.name, np.array(item.data).view(np.uint8)) for item in reader.tensors}
