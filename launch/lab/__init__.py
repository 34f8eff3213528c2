"""The scripts that trained the embedded models and their SAE."""
