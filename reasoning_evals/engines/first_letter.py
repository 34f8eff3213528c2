"""A sampler that answers with the most probable option letter as the next token: MMLU without generation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from reasoning_evals.engines.sampling import Request, Sample, SamplingConfig, model_identity, thinking_notes
from reasoning_evals.prompts import RenderedPrompt, render_prompt

_MASS = re.compile(r"mass of the letters: ([0-9.]+)")


class FirstLetterSampler:
    """One forward a prompt; the answer is the letter with most probability mass on the next token.

    The mass of a letter is the sum over its single-token spellings: alone and after a space. The text of a sample
    is ``\\boxed{B}`` with the masses behind it, its ids the letter's likeliest spelling; temperature and limits of the config
    play no part. ValueError if a letter has no single-token spelling.
    """

    def __init__(self, model: Any, tokenizer: Any, letters: str = "ABCD") -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.letters = letters
        self._forms = {letter: _forms(tokenizer, letter) for letter in letters}

    def render(self, question: str) -> RenderedPrompt:
        """The question in the tokenizer's chat template, without a thought."""
        return render_prompt(self.tokenizer, question, thinking=False)

    def describe(self) -> dict[str, Any]:
        """What identifies this engine in run.json."""
        return {
            "engine": "first_letter",
            **model_identity(self.model),
            "letters": {letter: list(forms) for letter, forms in self._forms.items()},
            **thinking_notes(self.tokenizer),
        }

    def sample(self, requests: Sequence[Request], config: SamplingConfig) -> Iterator[Sample]:
        """Yield one sample a request; longest prompts first."""
        order = sorted(requests, key=lambda request: (-len(request.prompt_ids), request.prompt_ids))
        for start in range(0, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            with torch.inference_mode():
                chance_BV = self._next_token(batch)
            for request, chance_V in zip(batch, chance_BV, strict=True):
                yield self._sample(request, chance_V)

    def _next_token(self, requests: Sequence[Request]) -> Tensor:
        """Probabilities [B, V] of the token after each prompt; rows are left-padded, as in decoding."""
        width = max(len(request.prompt_ids) for request in requests)
        tokens_BT = torch.zeros((len(requests), width), dtype=torch.long)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, request in enumerate(requests):
            tokens_BT[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask_BT[row, width - len(request.prompt_ids) :] = 1
        device = self.model.device
        output = self.model(
            input_ids=tokens_BT.to(device),
            attention_mask=mask_BT.to(device),
            position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0).to(device),
            use_cache=False,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float().softmax(-1).cpu()

    def _sample(self, request: Request, chance_V: Tensor) -> Sample:
        mass = {letter: float(chance_V[list(forms)].sum()) for letter, forms in self._forms.items()}
        best = max(self.letters, key=lambda letter: mass[letter])
        token = max(self._forms[best], key=lambda form: float(chance_V[form]))
        each = ", ".join(f"{letter} {mass[letter]:.6f}" for letter in self.letters)
        text = f"\\boxed{{{best}}}\n\nmass of the letters: {sum(mass.values()):.6f} ({each})"
        return Sample(request.key, (token,), text, "stop")


def letter_mass(text: str) -> float | None:
    """Probability of all letters together, read back from the text of a sample; None for another sampler's text.

    If it is small, the model did not intend to answer with a letter, and its choice among the letters means little.
    """
    match = _MASS.search(text)
    return float(match[1]) if match else None


def _forms(tokenizer: Any, letter: str) -> tuple[int, ...]:
    found = []
    for spelling in (letter, f" {letter}"):
        ids = tokenizer(spelling, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            found.append(ids[0])
    if not found:
        raise ValueError(f"the tokenizer has no token of its own for {letter!r}: use generated answers, mmlu_generated")
    return tuple(dict.fromkeys(found))
