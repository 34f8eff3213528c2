"""What the name of a model leads to: a folder, a GGUF file or the hub; its configuration and its tokenizer, without its weights.

Of a tokenizer: what the library leaves out when it reads one from a folder, and what it reads wrongly.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from moe_steer.backends.blueprint import config_of, where_it_lies
from moe_steer.json_files import read_json, short
from moe_steer.lab import EMBEDDED

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_SLOW = {"tokenizer.model": "sentencepiece", "spiece.model": "sentencepiece", "tiktoken.model": "tiktoken"}
"""Files of vocabularies, and the packages that read them."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", *_SLOW)


def read_config(path_or_id: str | os.PathLike[str], **options: Any) -> Any:
    """Only the configuration of a model, named as for ``load_model``; a config.json without weights is enough."""
    given = Path(os.fspath(path_or_id))
    name = str(given.parent) if given.name == "config.json" else resolve(path_or_id)
    with _quiet_library():  # its warnings about a configuration come before our one line that refuses it
        return one_line_of(path_or_id, lambda: config_of(name, **options))


def read_tokenizer(path_or_id: str | os.PathLike[str], **options: Any) -> Any:
    """Only the tokenizer of a model, named as for ``load_model``."""
    source, file = where_it_lies(resolve(path_or_id))
    # lab-dense names the class that R1-Distill-Qwen names, on purpose (lab/export.py); transformers advises against it
    with _quiet_library() if os.fspath(path_or_id) in EMBEDDED else nullcontext():
        read = one_line_of(path_or_id, lambda: read_tokenizer_files(source, **file, **options), "the tokenizer of ")
    if file:
        read.name_or_path = resolve(path_or_id)  # the library names the folder
    return read


@contextmanager
def _quiet_library() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def resolve(path_or_id: str | os.PathLike[str]) -> str:
    """The folder, GGUF file or hub id; ValueError for what does not exist, and for a folder that holds neither config.json nor
    one GGUF file."""
    name = os.fspath(path_or_id)
    name = str(EMBEDDED[name].folder) if name in EMBEDDED else name
    if Path(name).is_dir() and not Path(name, "config.json").is_file() and (files := sorted(Path(name).glob("*.gguf"))):
        if len(files) > 1 and not _PART.search(files[0].name):
            raise ValueError(f"{name!r} holds {len(files)} GGUF files: give one of them, such as {os.fspath(files[0])}")
        name = os.fspath(files[0])
    if name.endswith(".gguf"):
        return _gguf(name)
    looks_like_path = os.sep in name or name.startswith(".")
    if looks_like_path and not Path(name).exists() and (name.count("/") != 1 or name[0] in "./"):
        raise ValueError(
            f"there is no model folder {name!r}: give a folder with config.json, a hub id or one of {', '.join(EMBEDDED)}"
        )
    if Path(name, "adapter_config.json").is_file() and not Path(name, "config.json").is_file():
        raise ValueError(
            f"{name!r} holds an adapter: merge it into its model first (peft: merge_and_unload, save_pretrained)"
        )
    if Path(name).exists() and not Path(name, "config.json").is_file():
        raise ValueError(f"{name!r} holds no config.json: give the folder of a checkpoint in the transformers format")
    return name


def _gguf(name: str) -> str:
    """The name of a GGUF file, local or in a hub repository; ValueError for a file that is not there, or is only a part."""
    if not Path(name).is_file() and (name.count("/") < 2 or name[0] in "./"):
        raise ValueError(f"there is no GGUF file {name!r}: give a file, or owner/name/file.gguf for one on the hub")
    if part := _PART.search(name):
        raise ValueError(
            f"{name!r} is one of {int(part[1])} parts, which the library does not join: llama-gguf-split --merge FIRST_PART WHOLE "
            "does, then give the whole file"
        )
    return name


def _said(error: Exception) -> list[str]:
    """The lines of an error, shortened; a headline that ends in a colon takes the next one with it."""
    if "weights_only" in str(error):  # torch advises to run the code in the file
        return [
            "its weights hold other things than tensors, and other pickles are not opened: give a safetensors checkpoint"
        ]
    if "trust_remote_code" in str(error):
        return ["its code comes with the checkpoint: read through it, then --trust-remote-code runs it"]
    if isinstance(error, KeyError):
        return [f"transformers looks for the key {short(str(error))} in its files and finds none: fetch it again"]
    lines = [short(line) for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return [f"{lines[0]} {lines[1]}"] if lines[0].endswith(":") and len(lines) > 1 else lines


def one_line_of(path_or_id: str | os.PathLike[str], load: Callable[[], Any], what: str = "") -> Any:
    """What ``load`` returns; ValueError in one line for whatever the library raises."""
    try:
        with warnings.catch_warnings():
            for said in ("Initializing zero-element tensors", "Detected pickle protocol"):
                warnings.filterwarnings("ignore", said)
            return load()
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"the model {os.fspath(path_or_id)!r} does not fit on this GPU: ask 'moe-steer memory' which backend does"
        ) from error
    except Exception as error:  # the library raises a dozen kinds for missing, gated, torn and unknown checkpoints
        first = _said(error)
        name = os.fspath(path_or_id)
        folder_of_file = Path(name).name == "config.json"
        if not folder_of_file and resolve(name).endswith(".gguf"):
            package = isinstance(error, ImportError) and "gguf" in str(error).lower()
            remedy = "pip install 'moe-steer[gguf]'" if package else "give the checkpoint that the file was made from"
            raise ValueError(
                f"{what}the GGUF file {name!r} cannot be read by transformers ({first[0].rstrip('.')}): {remedy}"
            ) from error
        if isinstance(error, ModuleNotFoundError) and error.name:  # some quantisers import their package without a word
            first[0] += f": pip install {error.name.partition('.')[0]}"
        known = "" if "/" in name else f" (the embedded models are {' and '.join(EMBEDDED)})"
        raise ValueError(f"{what}the model {name!r} cannot be loaded: {first[0]}{known}") from error


def read_tokenizer_files(source: str, **options: Any) -> Any:
    """The tokenizer of a folder or hub id, with the chat template of ``chat_template.json``, which the library reads for
    processors alone.

    ValueError for one that knows no words (in a folder without the files of its class the library builds it empty), and where
    a package is missing that its vocabulary needs; as the library's own for the rest.
    """
    from transformers import AutoTokenizer

    if "gguf_file" in options:
        return AutoTokenizer.from_pretrained(source, **options)
    for path in (Path(source, name) for name in ("tokenizer_config.json", "special_tokens_map.json")):
        if path.is_file():  # the library's reader keeps the last of two equal keys
            read_json(path, "fetch it again", {"model_max_length": int | float | None}, endless=True)
    if missing := _package_missing(source):
        raise ValueError(missing)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:
        if Path(source).is_dir() and not any(Path(source, name).is_file() for name in _VOCABULARIES):
            raise ValueError(_no_words(source)) from error
        raise
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):
        raise ValueError(_no_words(source))
    tokenizer = _with_its_own_splitting(tokenizer, source, options)
    if not tokenizer.chat_template and (template := _template_of_processor(source, options.get("revision"))):
        tokenizer.chat_template = template
    return tokenizer


def _no_words(source: str) -> str:
    other = " (tekken.json is none of them)" if Path(source, "tekken.json").is_file() else ""
    return (
        f"it has no words: tokenizer.json or the other files of its class are missing{other}; fetch the checkpoint again, "
        "or copy them from the model it was made from"
    )


def _with_its_own_splitting(tokenizer: Any, source: str, options: dict[str, Any]) -> Any:
    """The tokenizer, read anew where the library put the splitting of words of a family's class in the place of tokenizer.json's, as
    transformers 5.23 does beside every Qwen2 model: other pieces of words are other tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if type(tokenizer) is PreTrainedTokenizerFast or not isinstance(tokenizer, PreTrainedTokenizerFast):
        return tokenizer
    file = _file_of(source, "tokenizer.json", options.get("revision"))
    written = [] if file is None else _splitting(Tokenizer.from_file(file))
    used = tokenizer.backend_tokenizer
    if not written or used.pre_tokenizer is None or written == _splitting(used):
        return tokenizer
    return PreTrainedTokenizerFast.from_pretrained(source, **options)


def _splitting(backend: Any) -> list[str]:
    """The patterns by which a tokenizer splits a text."""
    return [] if backend.pre_tokenizer is None else _regexes(json.loads(backend.pre_tokenizer.__getstate__()))


def _regexes(section: Any) -> list[str]:
    inner = section.values() if isinstance(section, dict) else section if isinstance(section, list) else ()
    own = [section["Regex"]] if isinstance(section, dict) and isinstance(section.get("Regex"), str) else []
    return [*own, *(pattern for part in inner for pattern in _regexes(part))]


def _file_of(source: str, name: str, revision: str | None) -> str | None:
    """The path of a file of a folder or hub id; None where there is none."""
    from transformers.utils import cached_file

    quiet: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    found: str | None = cached_file(source, name, revision=revision, **quiet)
    return found


def _template_of_processor(source: str, revision: str | None) -> str | None:
    file = _file_of(source, "chat_template.json", revision)
    if file is None:
        return None
    template = read_json(file, "fetch it again, or give a template with --chat-template FILE").get("chat_template")
    return template if isinstance(template, str) else None


def _package_missing(source: str) -> str | None:
    """What to install for a vocabulary in a file that needs a package which is not there: the library may name another one."""
    if any(Path(source, name).is_file() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        return None
    for name, package in _SLOW.items():
        if Path(source, name).is_file() and find_spec(package) is None:
            protobuf = " protobuf" if package == "sentencepiece" else ""
            return f"its vocabulary is {name}: pip install {package}{protobuf}"
    return None
