"""The embedded reasoning models: their checkpoints, the generator of their problems and the scripts that trained them."""

from pathlib import Path

LAB_MODEL: Path = Path(__file__).parent / "model"
"""Folder of the mixture-of-experts checkpoint "lab", loadable by `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer`."""

LAB_DENSE: Path = Path(__file__).parent / "dense"
"""Folder of the dense checkpoint "lab-dense" (Qwen2), whose thoughts repeat themselves."""

LAB_SAE: Path = Path(__file__).parent / "dense_sae"
"""Folder of the dense model's sparse autoencoder."""

LAB_SEARCH: Path = Path(__file__).parent / "search_model"
"""Folder of the mixture-of-experts checkpoint "lab-search", which solves by trying: giving up costs it right answers."""

EMBEDDED: dict[str, Path] = {"lab": LAB_MODEL, "lab-dense": LAB_DENSE, "lab-search": LAB_SEARCH}
"""The names under which `load_model` knows them."""

_PROBLEMS = {"lab": "lab", "lab-dense": "lab", "lab-search": "lab-search"}

OWN_PROBLEMS = "own"


def problems_of(problems: str, model: str) -> str:
    """The problems asked for; where that is `OWN_PROBLEMS`, the task that an embedded model was trained on."""
    return _PROBLEMS.get(model, "lab") if problems == OWN_PROBLEMS else problems


def is_made_up(problems: str) -> bool:
    """Whether they are a lab's, which makes as many up as are asked for, in splits of its own."""
    return problems in _PROBLEMS.values()


__all__ = ["EMBEDDED", "LAB_DENSE", "LAB_MODEL", "LAB_SAE", "LAB_SEARCH", "OWN_PROBLEMS", "is_made_up", "problems_of"]
