"""A tokenizer as it lies in a checkpoint's folder: what the library leaves out when it reads one, and what it reads wrongly."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_steer.json_files import read_json

_SLOW = {"tokenizer.model": "sentencepiece", "spiece.model": "sentencepiece", "tiktoken.model": "tiktoken"}
"""Files of vocabularies, and the packages that read them."""
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", *_SLOW)


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
    if not tokenizer.chat_template and (template := _template_of_processor(source, options.get("revision"))):
        tokenizer.chat_template = template
    return tokenizer


def _no_words(source: str) -> str:
    other = " (tekken.json is none of them)" if Path(source, "tekken.json").is_file() else ""
    return (
        f"it has no words: tokenizer.json or the other files of its class are missing{other}; fetch the checkpoint again, "
        "or copy them from the model it was made from"
    )


def _template_of_processor(source: str, revision: str | None) -> str | None:
    from transformers.utils import cached_file

    quiet: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    file = cached_file(source, "chat_template.json", revision=revision, **quiet)
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
