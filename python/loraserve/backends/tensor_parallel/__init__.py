"""One model on several processes of this machine: rank 0 is the engine's, the others compute beside it."""
