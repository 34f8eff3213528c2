"""One file per published format, each with ``recognises(path)`` and ``read(path, given)``."""
