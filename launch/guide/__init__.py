"""The first five minutes: a demonstration, and what this machine has and lacks."""
