"""The parts of launch/safety.py."""
