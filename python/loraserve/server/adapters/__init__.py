"""Adapters at run time: where they may come from, loading them, keeping that for the next start."""
