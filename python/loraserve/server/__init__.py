"""Network front ends of the engine: they parse, validate and translate, nothing else."""
