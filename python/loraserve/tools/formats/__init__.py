"""How model families write calls: a parser and a grammar of each."""
