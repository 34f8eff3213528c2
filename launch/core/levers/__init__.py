"""The words of an arm, and what each makes of prompts and decoding (``launch.core.arms`` puts them together)."""
