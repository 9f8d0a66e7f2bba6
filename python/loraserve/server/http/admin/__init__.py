"""Administration of adapters over HTTP."""
