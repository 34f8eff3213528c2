"""The embedded reasoning models: their checkpoints, the generator of their problems and the scripts that trained them."""

from pathlib import Path
from typing import NamedTuple

LAB_MODEL: Path = Path(__file__).parent / "model"
"""Folder of the mixture-of-experts checkpoint "lab", loadable by `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer`."""

LAB_SERVED: Path = Path(__file__).parent / "served"
"""Folder of the same model with its latents filled up with zeros, in the sizes that engines have kernels for: vLLM, SGLang and
llama.cpp serve it as it is. Here the other one is taken, which is faster without such kernels."""

LAB_DENSE: Path = Path(__file__).parent / "dense"
"""Folder of the dense checkpoint "lab-dense" (Qwen2), whose thoughts repeat themselves."""

LAB_SAE: Path = Path(__file__).parent / "dense_sae"
"""Folder of the dense model's sparse autoencoder."""

LAB_SEARCH: Path = Path(__file__).parent / "search_model"
"""Folder of the mixture-of-experts checkpoint "lab-search", which solves by trying: giving up costs it right answers."""


class Embedded(NamedTuple):
    """A model that comes with this package."""

    folder: Path
    problems: str
    """The task that it was trained on."""
    longest_answer: int
    """In tokens, thought included, with room to spare."""
    served: Path | None = None
    """Folder that engines are given, where it is another one."""


_LAB = Embedded(LAB_MODEL, "lab", 256, served=LAB_SERVED)
EMBEDDED: dict[str, Embedded] = {
    "lab": _LAB,
    "lab-plain": _LAB,
    "lab-dense": Embedded(LAB_DENSE, "lab", 384),
    "lab-search": Embedded(LAB_SEARCH, "lab-search", 440),
}
"""The names under which `load_model` knows them. `lab-plain` is `lab`, beside the lab whose thinking pays: there more thought never helps."""

OWN_PROBLEMS = "own"


def problems_of(problems: str, model: str) -> str:
    """The problems asked for; where that is `OWN_PROBLEMS`, the task that an embedded model was trained on."""
    return EMBEDDED.get(model, _LAB).problems if problems == OWN_PROBLEMS else problems


def is_made_up(problems: str) -> bool:
    """Whether they are a lab's, which makes as many up as are asked for, in splits of its own."""
    return any(problems == model.problems for model in EMBEDDED.values())


__all__ = [
    "EMBEDDED",
    "LAB_DENSE",
    "LAB_MODEL",
    "LAB_SAE",
    "LAB_SEARCH",
    "LAB_SERVED",
    "OWN_PROBLEMS",
    "Embedded",
    "is_made_up",
    "problems_of",
]
