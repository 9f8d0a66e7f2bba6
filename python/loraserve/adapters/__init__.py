"""Adapters by name: where they come from and how their bytes reach the pool."""
