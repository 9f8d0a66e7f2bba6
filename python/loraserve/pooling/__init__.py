"""Requests whose answer is no text: embeddings, classes, hidden states."""
