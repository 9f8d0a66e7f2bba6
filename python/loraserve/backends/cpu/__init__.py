"""The CPU backend: kernels in Rust on one thread pool, the forward pass as one recorded call."""
