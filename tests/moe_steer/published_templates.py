"""The published chat templates that lie beside the project, each on a tokenizer that has the tags of all of them as tokens."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja")) if FOLDER.is_dir() else []
TAGS = [
    "<think>", "</think>", "[THINK]", "[/THINK]", "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|channel>",
    "<channel|>", "<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
    "<seed:think>", "</seed:think>",
]  # fmt: skip
NOT_THINKING = {
    "CohereForAI-c4ai-command-r-plus-tool_use", "GigaChat3-10B-A1.8B", "Kimi-K2-Instruct", "LFM2-8B-A1B", "MiMo-VL",
    "MiniMax-M1", "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use", "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    "Qwen-Qwen2.5-7B-Instruct", "Qwen3-Coder", "fireworks-ai-llama-3-firefunction-v2", "google-gemma-2-2b-it",
    "ibm-granite-granite-4.0", "ibm-granite-granite-4.1", "meetkai-functionary-medium-v3.1",
    "meetkai-functionary-medium-v3.2", "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.3-70B-Instruct",
    "microsoft-Phi-3.5-mini-instruct", "mistralai-Mistral-Nemo-Instruct-2407", "moonshotai-Kimi-K2",
    "unsloth-mistral-Devstral-Small-2507",
}  # fmt: skip
"""Templates that speak of no thoughts. Of two of their models it is known that they think all the same (MiniMax-M1, MiMo-VL):
nothing in the template says so."""
OF_TOOLS = {
    "fireworks-ai-llama-3-firefunction-v2",
    "meetkai-functionary-medium-v3.1",
    "meetkai-functionary-medium-v3.2",
}
"""Templates that cannot be rendered without functions to call."""

needs_templates = pytest.mark.skipif(not NAMES, reason="the published chat templates are not beside the checkout")


def byte_tokenizer(tags: list[str] = TAGS, template: str | None = None) -> Any:
    """One token a byte, and the tags."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>")
    tokenizer.add_tokens(list(tags), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def published(name: str) -> Any:
    """A tokenizer with a published template."""
    return byte_tokenizer(template=(FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))
