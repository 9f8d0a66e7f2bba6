"""Parsers and grammars of calls and reasoning."""
