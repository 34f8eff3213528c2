"""The tiny families as checkpoints on disk, as users have them: weights, configuration, tokenizer and chat template.

Windows, chunks, pools and index budgets are narrow, so that short texts run beyond them.
"""

from __future__ import annotations

import functools
import string
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from families import TEXT_IDS
from narrow_families import narrow

_SPECIAL = ("<pad>", "<s>", "</s>", "<think>", "</think>")
_MERGES = [("W", "a"), ("i", "t"), ("Wa", "it"), ("\u0120", "Wait")]
_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} \n{% endfor %}"
    "{% if add_generation_prompt %}assistant <think>\n{% endif %}"
)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="families-")


@functools.cache
def checkpoint(name: str) -> Path:
    """The folder of a family's checkpoint, written once a session."""
    folder = Path(_folder().name, name)
    narrow(name).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over ASCII, which the library can rebuild as the class that it has for a family; its few ids are text in
    every family."""
    letters = [*string.ascii_letters, *string.digits, *".,:;=+-?!", "\u0120", "\u010a"]  # the last: space, newline
    pieces = [*_SPECIAL, *letters, *("".join(pair) for pair in _MERGES)]
    assert len(pieces) <= TEXT_IDS.stop
    core = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, _MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    own = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=_TEMPLATE
    )
    own.add_tokens([AddedToken(tag, normalized=False) for tag in _SPECIAL[3:]])
    return own
