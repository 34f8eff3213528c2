"""The embedded reasoning models: their checkpoints, the generator of their problems and the scripts that trained them."""

from pathlib import Path

LAB_MODEL: Path = Path(__file__).parent / "model"
"""Folder of the mixture-of-experts checkpoint "lab", loadable by `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer`."""

LAB_DENSE: Path = Path(__file__).parent / "dense"
"""Folder of the dense checkpoint "lab-dense" (Qwen2), whose thoughts repeat themselves."""

LAB_SAE: Path = Path(__file__).parent / "dense_sae"
"""Folder of the dense model's sparse autoencoder."""

EMBEDDED: dict[str, Path] = {"lab": LAB_MODEL, "lab-dense": LAB_DENSE}
"""The names under which `load_model` knows them."""

__all__ = ["EMBEDDED", "LAB_DENSE", "LAB_MODEL", "LAB_SAE"]
