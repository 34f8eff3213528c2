"""A plan's say in the router's choice: experts forced in or out, biases on logits, another number of experts a token."""
