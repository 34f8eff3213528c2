"""What a configuration says of its model: the class that reads it, its precision, and the model itself without memory."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moe_steer.backends.allocations import Bounded, Unplanned
from moe_steer.json_files import read_json, short

_HEADERS: dict[tuple[str, Any], Any] = {}


def torch_dtype(name: str) -> str | torch.dtype:
    """The dtype with this name; ValueError for unknown names."""
    if name == "auto":
        return name
    value = getattr(torch, name, None)
    if not isinstance(value, torch.dtype):
        raise ValueError(f"dtype {name!r} is unknown: give auto, float32, bfloat16 or float16")
    return value


def stored_dtype(config: Any) -> torch.dtype:
    """The precision that a checkpoint computes in (for FP8, the precision to which it is dequantised)."""
    value = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."))
    return value if isinstance(value, torch.dtype) else torch.float32


def quantisation(config: Any) -> str:
    """The method in which a checkpoint is quantised, by the library's name; empty for none, ``UNNAMED`` where none is stated (MLX)."""
    return _method(quantisation_settings(config))


def quantisation_settings(config: Any) -> Any:
    """What the configuration says of the quantisation: a dictionary, empty for none, or an object of the library."""
    return getattr(_holder(config), "quantization_config", None) or getattr(config, "quantization", None) or {}


def _holder(config: Any) -> Any:
    """The part of a configuration that says how the checkpoint is quantised: the whole, or its text part."""
    text = config.get_text_config()
    whole = getattr(config, "quantization_config", None) or not getattr(text, "quantization_config", None)
    return config if whole else text


def _method(quantization: Any) -> str:
    stated = quantization if isinstance(quantization, dict) else {}
    method = stated.get("quant_method") or getattr(quantization, "quant_method", "")
    if stated and not method:  # the library knows bitsandbytes by its bits
        method = "bitsandbytes" if stated.get("load_in_8bit") or stated.get("load_in_4bit") else UNNAMED
    return str(getattr(method, "value", method))


UNNAMED = "an unnamed method's"
BLOCKS = ("fp8", "mxfp4")
"""Methods whose blocks of few bits are planned, and expanded by any backend."""


def in_blocks(config: Any) -> bool:
    """Whether the checkpoint holds blocks of few bits that can be expanded while reading."""
    return quantisation(config) in BLOCKS


def is_fp8(config: Any) -> bool:
    """Whether the checkpoint holds FP8 blocks."""
    return quantisation(config) == "fp8"


def dequantised(config: Any) -> dict[str, Any]:
    """Options that make transformers expand a checkpoint of FP8 or MXFP4 blocks while reading; none for other checkpoints."""
    if not in_blocks(config):
        return {}
    from transformers import FineGrainedFP8Config, Mxfp4Config

    return {"quantization_config": (FineGrainedFP8Config if is_fp8(config) else Mxfp4Config)(dequantize=True)}


def is_mxfp4(config: Any) -> bool:
    """Whether the experts of the checkpoint are MXFP4 blocks, as in gpt-oss."""
    return quantisation(config) == "mxfp4"


def where_it_lies(name: str) -> tuple[str, dict[str, Any]]:
    """(folder or hub id, options that name the file) for every ``from_pretrained`` of a model: a name that ends in ``.gguf`` is
    a file in a folder, or in a hub repository (``owner/name/file.gguf``)."""
    if not name.endswith(".gguf"):
        return name, {}
    if os.path.isfile(name):
        return os.path.dirname(name) or ".", {"gguf_file": os.path.basename(name)}
    owner, repository, *file = name.split("/")
    return f"{owner}/{repository}", {"gguf_file": "/".join(file)}


def config_of(name: str, **options: Any) -> Any:
    """The configuration of a model, from config.json or from the header of a GGUF file, which is then its name. A header is
    kept: the library reads the whole vocabulary for it, half a minute for 262,144 tokens."""
    from transformers import AutoConfig

    source, file = where_it_lies(name)
    if not file:
        return _for_running(_from_json(source, options))
    key = (name, os.path.getmtime(name) if os.path.isfile(name) else options.get("revision"))
    if key not in _HEADERS:
        _HEADERS[key] = AutoConfig.from_pretrained(source, **file, **options)
        _HEADERS[key]._name_or_path = name
    return copy.deepcopy(_HEADERS[key])


def _for_running(config: Any) -> Any:
    """Without what a training run left in it: tuples in place of named outputs; a loss over the routers, which the library cannot
    compute while it generates; attention by a package that is not here, in place of which any other computes the same."""
    from transformers import utils

    before, flash, version = str(getattr(config, "_attn_implementation", None)).partition("flash_attention_")
    is_here = getattr(utils, f"is_flash_attn_{version}_available", None)
    if flash and not before and not (is_here and is_here()):
        config._attn_implementation = None
    for part in (config, config.get_text_config()):
        for name, value in (("return_dict", True), ("output_router_logits", False)):
            if getattr(part, name, value) != value:
                setattr(part, name, value)
    return config


def is_gguf(config: Any) -> bool:
    """Whether a configuration of ``config_of`` is a GGUF file's."""
    return str(getattr(config, "_name_or_path", "")).endswith(".gguf")


def _from_json(name: str, options: dict[str, Any]) -> Any:
    """Where the library does not know the type, but has the class that is named (Kimi-K2 says kimi_k2 and DeepseekV3ForCausalLM),
    the configuration of that class."""
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    expect = {"model_type": str, "architectures": list[str] | None, "quantization_config": dict | None}
    for file in ("config.json", "generation_config.json"):  # the library's reader keeps the last of two equal keys
        if os.path.isfile(path := os.path.join(name, file)):
            read_json(path, "fetch it again", expect, endless=True)
    values, _ = PreTrainedConfig.get_config_dict(name, **options)
    own: Any = getattr(transformers, (values.get("architectures") or [""])[0], None)
    if (
        values.get("model_type") in CONFIG_MAPPING
        or options.get("trust_remote_code")
        or not hasattr(own, "config_class")
    ):
        return AutoConfig.from_pretrained(name, **options)
    return own.config_class.from_dict({**values, "model_type": own.config_class.model_type})


def model_class(config: Any) -> Any:
    """What reads checkpoints of ``config`` and writes text: the class that the configuration names, else the one that the
    library has for its type; ValueError where neither exists.

    A composite model must be read by its own class: another one would find its tensors under other names, and leave some random.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}) and _is_remote(config):
        return AutoModelForCausalLM
    named = (getattr(config, "architectures", None) or [""])[0]
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{named or config.model_type} is an encoder-decoder: give a decoder model that writes text")
    own = getattr(transformers, named, None)
    by_type = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    usual = next((auto for auto in by_type if type(config) in auto._model_mapping), None)
    if own is None or not (
        hasattr(own, "can_generate") and own.can_generate() and isinstance(config, own.config_class)
    ):
        if usual is None:
            raise ValueError(
                f"transformers {transformers.__version__} has no class that writes text for {named or config.model_type}: "
                "install the version that the model's page names, or give trust_remote_code where its code comes with it"
            )
        return usual
    # Where both are the same, the library's own way, which also looks for adapters.
    return usual if usual is not None and usual._model_mapping[type(config)] is own else own


def _is_remote(config: Any) -> bool:
    return type(config).__module__.startswith("transformers_modules")


@contextmanager
def planning(config: Any) -> Iterator[None]:
    """Whatever fails inside is ``Unplanned``, in one line: a plan is a forecast, and the library's code may not run without
    data."""
    try:
        yield
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:160]
        reason = first if isinstance(error, ValueError) else f"{type(error).__name__}: {first}"
        kind = str(config.model_type)[:40]
        raise Unplanned(f"the memory of this {kind} model cannot be planned ({reason})") from error


_MOST_LAYERS = 500


@contextmanager
def _possible(config: Any) -> Iterator[None]:
    """ValueError in place of what the library raises late for a configuration that no model can have."""
    text = config.get_text_config()
    layers, experts = getattr(text, "num_hidden_layers", None), getattr(text, "n_routed_experts", None) or 0
    groups, chosen = (getattr(text, "n_group", None) or 0), (getattr(text, "topk_group", None) or 0)
    if empty := [name for name in ("hidden_size", "num_attention_heads", "vocab_size") if getattr(text, name, 1) == 0]:
        raise ValueError(f"{empty[0]} is 0 in its configuration: no model has none")
    if isinstance(layers, int) and not 0 < layers <= _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {layers} in its configuration: 1 to {_MOST_LAYERS} can be built")
    if (groups or chosen) and not (0 < chosen <= groups and experts % groups == 0):
        said = f"topk_group is {chosen}, n_group {groups} and n_routed_experts {experts} in its configuration"
        raise ValueError(f"{said}: groups are of one size, and one to all are chosen")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")
            yield
    except (ArithmeticError, AssertionError, AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"no model can be built from its configuration ({type(error).__name__}: {short(error)})"
        ) from error
    except KeyError as error:  # a word that one of the library's tables lacks, such as a rope_type
        word = str(error)[:60]
        raise ValueError(f"its configuration says {word}, which this version of transformers does not know") from error


def skeleton(config: Any, dtype: str = "auto") -> Any:
    """The model of ``config`` on the meta device: parameters with shapes and dtypes but without memory.

    ``dtype``: auto (as stored: FP8 and MXFP4 stay so), fp8 (the family's experts and linear layers in FP8 blocks of 128), or a
    torch name, to which a checkpoint in blocks is expanded. ValueError for a configuration that no model can have.
    """
    config = copy.deepcopy(config)
    packed = in_blocks(config)
    holder = _holder(config)
    quantization = holder.quantization_config if packed else None
    if packed:
        del holder.quantization_config
    asked = torch.bfloat16 if dtype == "fp8" else torch_dtype(dtype)
    chosen = stored_dtype(config) if isinstance(asked, str) else asked
    own = model_class(config)
    build = getattr(own, "from_config", None) or own._from_config
    with _possible(config), torch.device("meta"), Bounded():
        model = build(config, dtype=chosen, **({"trust_remote_code": True} if _is_remote(config) else {}))
    if dtype == "fp8" or (dtype == "auto" and packed):
        (_to_mxfp4 if _method(quantization) == "mxfp4" and dtype == "auto" else _to_fp8)(model, quantization)
    return model.eval()


def _to_mxfp4(model: Any, quantization: Any) -> None:
    """The experts' matrices as the kernels hold them: four bits a number, and a scale of eight for every 32."""
    for name, module in model.named_modules():
        if not name.endswith(".experts"):
            continue
        for key, whole in list(module.named_parameters(recurse=False)):
            if whole.ndim == 3:
                packed = torch.empty((len(whole), whole[0].numel() * 17 // 32), dtype=torch.uint8, device="meta")
                setattr(module, key, torch.nn.Parameter(packed, requires_grad=False))


def _to_fp8(model: Any, quantization: Any) -> None:
    from transformers import FineGrainedFP8Config
    from transformers.integrations import finegrained_fp8 as fp8
    from transformers.quantizers.base import get_keys_to_not_convert

    if quantization is None or _method(quantization) != "fp8":
        settings = FineGrainedFP8Config()
    elif isinstance(quantization, dict):
        settings = FineGrainedFP8Config.from_dict(quantization)
    else:
        settings = quantization
    skipped = [*get_keys_to_not_convert(model), *(settings.modules_to_not_convert or [])]
    # The library wraps this class anew for every layer and never takes that back: each plan would take longer than the one before, up to
    # Python's limit of recursion.
    own = fp8.FP8Experts
    fp8.FP8Experts = type(own.__name__, (own,), {"__module__": own.__module__})
    try:
        fp8.replace_with_fp8_linear(
            model, modules_to_not_convert=skipped, quantization_config=settings, pre_quantized=True
        )
    finally:
        fp8.FP8Experts = own
