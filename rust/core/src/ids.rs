//! The names of things: pages, slots, requests, adapters, what an adapter *is*, and whose KV it is.

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

/// A registered adapter; never reused, so a late answer cannot reach another adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterId(pub u32);

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
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct PrefixIdentity {
    pub scope: CacheScope,
    /// With the bits of their weights; empty is the base model.
    pub adapters: Vec<(AdapterKey, u32)>,
}
