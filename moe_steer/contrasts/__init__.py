"""From texts and traces to the statistics of two sides of a contrast, in one pass of the model."""
