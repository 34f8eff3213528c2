"""Sparse autoencoders: read from every published format, written as SAELens folders, measured, trained."""

from moe_steer.saes.fit import SAEFit, check_fits, measure_fit
from moe_steer.saes.formats.saelens import save_sae
from moe_steer.saes.reading import load_sae
from moe_steer.saes.sae import SAE, SAEAbout
from moe_steer.saes.training import train_sae
from moe_steer.saes.training_state import TrainRecipe

__all__ = ["SAE", "SAEAbout", "SAEFit", "TrainRecipe", "check_fits", "load_sae", "measure_fit", "save_sae", "train_sae"]
