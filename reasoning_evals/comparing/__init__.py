"""Paired comparison of arms: statistics, power, verdicts in words."""
