"""The lab model's tokenizer: byte-level BPE over words and operators, every digit a token of its own.

What both embedded models carry beside their weights: the special tokens' ids, and how they answer when nothing is said.
The lab model's architecture: DeepSeek-V3 in small (MLA, sigmoid router with correction bias and groups).
The dense lab model's architecture: Qwen2 in small, as in DeepSeek-R1-Distill-Qwen (grouped-query attention, untied).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """As configurations name them."""
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def generation_defaults(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """DeepSeek-R1's sampling, up to so many tokens."""
    return GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.95, max_new_tokens=max_new_tokens, **special_ids(tokenizer)
    )


BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK_START, THINK_END = "<think>", "</think>"
SPECIAL_TOKENS = [PAD, BOS, EOS, USER, ASSISTANT]
VOCAB_SIZE = 1024
MAX_LENGTH = 512

WORDS = r" ?\p{L}+"
DIGIT = r"\p{N}"
OPERATOR = r" ?[+\-*/=^]+ ?"
PIECES = rf"{WORDS}|{DIGIT}|{OPERATOR}|\s|[^\s\p{{L}}\p{{N}}]"
"""One piece = a word with the space before it, one digit, an operator with its spaces, or one other character."""

REASONING_WORDS = [
    "Wait",
    "Alternatively",
    "Hmm",
    "Let",
    "So",
    "Okay",
    "Good",
    "Yes",
    "No",
    "That",
    "First",
    "Then",
    "But",
    "However",
    "Therefore",
    "Check",
]

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '" + USER + "' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '" + ASSISTANT + "' + message['content'].split('</think>')[-1].lstrip() + eos_token }}"
    "{% else %}{{ raise_exception('roles are system, user and assistant, not ' + message['role']) }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ASSISTANT + "<think>\\n' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer learned from the texts; any Unicode text can be encoded and decoded back exactly.

    `<think>` and `</think>` are single tokens that decoding never drops, as in DeepSeek-R1's distilled models.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    markers = " ".join(REASONING_WORDS) + "".join(f"\n{word}" for word in REASONING_WORDS)
    tokenizer.train_from_iterator([*texts, *[markers] * 200], trainer)
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in (THINK_START, THINK_END)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        extra_special_tokens={"user_token": USER, "assistant_token": ASSISTANT},
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def prompt_text(question: str) -> str:
    """What the chat template makes of one question, up to and including `<think>` and a newline."""
    return f"{BOS}{USER}{question}{ASSISTANT}{THINK_START}\n"


def lab_config(tokenizer: PreTrainedTokenizerBase) -> DeepseekV3Config:
    """Width 128, 4 layers of which the first is dense, 16 routed experts in 4 groups, 2 chosen, 1 shared."""
    return DeepseekV3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.0,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        num_mtp_layers=0,
        tie_word_embeddings=False,
        initializer_range=0.05,
        **special_ids(tokenizer),
    )


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int, max_new_tokens: int = 256) -> DeepseekV3ForCausalLM:
    """A freshly initialised model with its generation defaults set, in float32."""
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM._from_config(
        lab_config(tokenizer), attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    model.generation_config = generation_defaults(tokenizer, max_new_tokens)
    return model.float()


MAX_NEW_TOKENS = 384


SEARCH_NEW_TOKENS = 440
"""With the longest prompt this fills the context."""


def new_search_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> DeepseekV3ForCausalLM:
    """The same architecture, for longer thoughts."""
    return new_model(tokenizer, seed, SEARCH_NEW_TOKENS)


def dense_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """Width 128, 5 layers, 4 heads of 32 that share 2 key-value heads."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=416,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        initializer_range=0.05,
        **special_ids(tokenizer),
    )


def new_dense_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen2ForCausalLM:
    """A freshly initialised model with its generation defaults set, in float32."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM._from_config(dense_config(tokenizer), attn_implementation="sdpa")
    model.generation_config = generation_defaults(tokenizer, MAX_NEW_TOKENS)
    return model.float()
