"""Tools that an answer may call, and what of an answer's text is reasoning, content and calls."""
