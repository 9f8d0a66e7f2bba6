"""Batches: lines of requests in, lines of results out, however often the process ends in between."""
