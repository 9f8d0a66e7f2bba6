"""The ops models are written in: a protocol, a torch reference and a Rust CPU backend."""
