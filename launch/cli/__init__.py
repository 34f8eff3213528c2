"""The commands of ``moe-steer``."""
