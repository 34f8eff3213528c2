"""Which token is what: scopes, thoughts, markers, the tokens of a trace."""
