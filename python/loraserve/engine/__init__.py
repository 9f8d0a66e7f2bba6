"""The engine: one loop over one model, what it keeps of its sequences and adapters, and its front."""
