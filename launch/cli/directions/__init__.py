"""Commands that make directions and read other tools' (cli is full)."""
