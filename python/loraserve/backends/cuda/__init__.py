"""The CUDA backend: one NVIDIA GPU, decode steps as captured graphs."""
