//! Identity of an adapter: what it computes, whatever its path, age or unused config fields.

use blake3::Hasher;

use crate::bind::Binding;
use crate::replaced_rows::RowRun;
use crate::token_lora::TokenLora;
use crate::weights::Source;

/// Names what is hashed and how; changes whenever that does.
const DOMAIN: &[u8] = b"loraserve adapter content 2";

/// Hashes modules in order; equal hashes mean equal tensors and equal arithmetic.
pub(crate) struct ContentHash(Hasher);

impl ContentHash {
    pub(crate) fn new() -> Self {
        let mut hasher = Hasher::new();
        hasher.update(DOMAIN);
        Self(hasher)
    }

    /// Begins a module, whose tensors follow.
    pub(crate) fn module(&mut self, binding: &Binding) {
        self.bytes(binding.key().as_bytes());
        self.bytes(&binding.scale.to_le_bytes());
    }

    /// Begins `LoRA` on the embedding or the head, whose tensors follow.
    pub(crate) fn token_lora(&mut self, lora: &TokenLora) {
        self.bytes(lora.module.name().as_bytes());
        self.bytes(&lora.scale.to_le_bytes());
    }

    /// A tensor of one of the module's columns; `what` tells it from the module's other tensors.
    pub(crate) fn vector(&mut self, what: &str, source: &Source, data: &[u8]) {
        self.bytes(what.as_bytes());
        self.tensor(source, data);
    }

    /// Rows of tokens in place of the base's; `what` says in which tables. Their bytes follow, a digest a run.
    pub(crate) fn rows(&mut self, what: &str, runs: &[RowRun], width: usize) {
        self.bytes(what.as_bytes());
        self.0.update(&(width as u64).to_le_bytes());
        self.0.update(&(runs.len() as u64).to_le_bytes());
        for run in runs {
            self.0.update(&run.token.to_le_bytes());
            self.0.update(&run.count.to_le_bytes());
        }
    }

    /// Tokens of the head, where those are not the base's.
    pub(crate) fn vocabulary(&mut self, vocabulary: usize) {
        self.bytes(b"vocabulary");
        self.0.update(&(vocabulary as u64).to_le_bytes());
    }

    /// A run's values, as the file has them.
    pub(crate) fn run(&mut self, source: &Source, values: &Hasher) {
        self.bytes(source.info.dtype.to_string().as_bytes());
        self.0.update(values.finalize().as_bytes());
    }

    /// Of an adapter that acts from an invocation on; without one nothing is hashed.
    pub(crate) fn invocation(&mut self, tokens: &[i32]) {
        if !tokens.is_empty() {
            let tokens: Vec<u8> = tokens
                .iter()
                .flat_map(|token| token.to_le_bytes())
                .collect();
            self.bytes(b"alora_invocation_tokens");
            self.bytes(&tokens);
        }
    }

    /// BLAKE3 in hex.
    pub(crate) fn finish(self) -> String {
        self.0.finalize().to_hex().to_string()
    }

    /// A or B.
    pub(crate) fn tensor(&mut self, source: &Source, data: &[u8]) {
        self.bytes(source.info.dtype.to_string().as_bytes());
        for dimension in &source.info.shape {
            self.0.update(&(*dimension as u64).to_le_bytes());
        }
        // By itself: a hash from its first byte on runs in whole vectors.
        self.0.update(blake3::hash(data).as_bytes());
    }

    /// Length first, so that neighbouring fields can't run into each other.
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }
}
