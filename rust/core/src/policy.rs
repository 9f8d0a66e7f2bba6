//! `EvictionPolicy`: which idle thing is worth least, cached KV blocks and adapters on one scale.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdleKind {
    Block,
    Adapter,
}

/// Something nobody uses now that could be given up for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Idle {
    pub kind: IdleKind,
    /// Ticks of the memory clock since its last use.
    pub age: u64,
    pub num_pages: usize,
}

pub trait EvictionPolicy: Send + Sync {
    /// What a page of it is worth keeping: cost to bring back × chance of use ÷ pages, at least 0. The least goes first.
    fn worth(&self, idle: Idle) -> f64;
}

/// Least recently used first; the chance of use falls as one over the age.
#[derive(Debug, Clone, Copy, Default)]
pub struct Lru;

impl EvictionPolicy for Lru {
    fn worth(&self, idle: Idle) -> f64 {
        1.0 / (1.0 + idle.age as f64)
    }
}
