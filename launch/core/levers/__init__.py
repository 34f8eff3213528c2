"""The words of an arm, and what each makes of prompts and decoding (``arm_building`` puts them together)."""
