"""One file per published format or family of formats, each with ``recognises(path)`` and ``read(path, given)``."""
