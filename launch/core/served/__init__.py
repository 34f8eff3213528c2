"""A model that a server holds, in place of one that is loaded."""
