"""Commands that make levers which act at the right moment (launch.cli is full)."""
