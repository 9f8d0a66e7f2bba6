"""Logits to tokens: how a row is sampled, and which tokens its grammar allows."""
