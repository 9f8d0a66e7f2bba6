//! The names of things: pages, slots, requests, adapters, what an adapter *is* and does, and whose KV it is.

use std::ops::Range;
use std::sync::Arc;

/// A page of the pool: one KV block over all layers, or a piece of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(pub u32);

impl PageId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A row of the device's table of resident adapters; reused once its adapter is evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub u32);

impl SlotId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// A request, numbered in order of arrival; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// Whose share of the engine requests are served from; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId(pub u64);

/// A registered adapter; never reused, so a late answer cannot reach another adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterId(pub u32);

/// An adapter, by id or slot, as it acts on one sequence.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Applied<A> {
    pub adapter: A,
    /// Not zero.
    pub weight: f32,
    /// Tokens before it are computed without the adapter.
    pub first_token: usize,
}

/// The content hash of an adapter's tensors and config: its identity, whatever it is called.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterKey(pub Arc<str>);

impl AdapterKey {
    pub fn new(content_hash: &str) -> Self {
        Self(Arc::from(content_hash))
    }
}

/// Whose KV it is: sequences of different scopes never share blocks. Two fields, so that no salt can be chosen
/// that makes one tenant's scope another's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct CacheScope {
    pub tenant: Box<str>,
    pub salt: Box<str>,
}

/// What equal tokens need besides to have equal KV that may be shared.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PrefixIdentity {
    pub scope: Arc<CacheScope>,
    /// Ascending by first token; empty is the base model.
    adapters: Vec<ActingAdapter>,
}

/// An adapter that acts on a sequence from its first token on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ActingAdapter {
    pub key: AdapterKey,
    pub weight_bits: u32,
    pub first_token: usize,
}

impl PrefixIdentity {
    pub fn new(scope: CacheScope, adapters: impl IntoIterator<Item = ActingAdapter>) -> Self {
        let mut adapters: Vec<_> = adapters.into_iter().collect();
        adapters.sort_by_key(|adapter| adapter.first_token);
        let scope = Arc::new(scope);
        Self { scope, adapters }
    }

    /// Its adapters, as if they acted from the first token on.
    pub fn acting_anywhere(&self) -> Vec<ActingAdapter> {
        let mut adapters = self.adapters.clone();
        for adapter in &mut adapters {
            adapter.first_token = 0;
        }
        adapters.sort_by(|a, b| (&a.key, a.weight_bits).cmp(&(&b.key, b.weight_bits)));
        adapters
    }

    /// The adapters that begin to act at one of `tokens`.
    pub fn beginning_in(&self, tokens: Range<usize>) -> &[ActingAdapter] {
        let before = |end| self.adapters.partition_point(|a| a.first_token < end);
        &self.adapters[before(tokens.start)..before(tokens.end)]
    }
}
