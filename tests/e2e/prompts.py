"""Prompts of different lengths and kinds, as text."""

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "List three colours of the rainbow:",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Q: What is the tallest mountain on Earth?\nA:",
    "In 1969, humans first",
    "My favourite recipe starts with two eggs and",
    "SELECT name FROM users WHERE",
    "Dear Sir or Madam,",
    "The three laws of thermodynamics say that",
]
