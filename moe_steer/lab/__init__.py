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

PROBLEMS: dict[str, str] = {"lab": "lab", "lab-dense": "lab", "lab-search": "lab-search"}
"""The task that each of them was trained on; both tasks are made up, as many problems as are asked for."""

__all__ = ["EMBEDDED", "LAB_DENSE", "LAB_MODEL", "LAB_SAE", "LAB_SEARCH", "PROBLEMS"]
