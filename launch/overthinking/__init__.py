"""The parts of launch/reduce_overthinking.py."""
