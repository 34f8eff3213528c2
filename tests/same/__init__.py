"""The parts of ``tests/same.py``: what is run, how it is made comparable, how two stores are compared."""
