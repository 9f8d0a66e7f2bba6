//! Identity of an adapter: what it computes, whatever its path, age or unused config fields.

use sha2::{Digest, Sha256};

use crate::bind::{Binding, Source};
use crate::tensor_name::module_key;

/// Names what is hashed and how; changes whenever that does.
const DOMAIN: &[u8] = b"loraserve adapter content 1";

/// Hashes modules in order; equal hashes mean equal tensors and equal arithmetic.
pub(crate) struct ContentHash(Sha256);

impl ContentHash {
    pub(crate) fn new() -> Self {
        Self(Sha256::new_with_prefix(DOMAIN))
    }

    pub(crate) fn update(&mut self, binding: &Binding, a: &[u8], b: &[u8]) {
        self.bytes(module_key(binding.layer, &binding.path).as_bytes());
        self.bytes(&binding.scale.to_le_bytes());
        self.tensor(&binding.a, a);
        self.tensor(&binding.b, b);
    }

    /// SHA-256 in hex.
    pub(crate) fn finish(self) -> String {
        use std::fmt::Write;
        self.0
            .finalize()
            .iter()
            .fold(String::new(), |mut hex, byte| {
                write!(hex, "{byte:02x}").expect("writing to a string succeeds");
                hex
            })
    }

    fn tensor(&mut self, source: &Source, data: &[u8]) {
        self.bytes(source.info.dtype.to_string().as_bytes());
        for dimension in &source.info.shape {
            self.0.update((*dimension as u64).to_le_bytes());
        }
        self.bytes(data);
    }

    /// Length first, so that neighbouring fields can't run into each other.
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }
}
