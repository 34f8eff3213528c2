"""``moe-steer playground``: a local page on which a steered model is seen thinking, next to itself."""
