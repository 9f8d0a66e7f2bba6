//! `PrefixCache`: full KV blocks found again by whose they are and what computed them: tokens, and adapters from where
//! they act. Blocks before the first token of every adapter are the base model's.
//!
//! A block is found by a 64-bit hash and believed only after its parent and its tokens compare equal, so a
//! collision costs a miss, never wrong KV. The hash is keyed at random: a caller who could make its blocks
//! collide with a guess at another's would learn from the miss whether the other's is there. A parent is named by a
//! number that is never reused. Whoever refers to a block refers to its parents too, and releases children first: an idle block's descendants are idle and older.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use crate::ids::{ActingAdapter, CacheScope, PageId, PrefixIdentity};

/// What comes before a block.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Parent {
    Root(Arc<CacheScope>),
    Block(BlockRef),
}

/// What computed a block that comes after its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Content<'a> {
    /// The adapters that begin to act in it.
    pub beginning: &'a [ActingAdapter],
    pub tokens: &'a [i32],
}

impl<'a> Content<'a> {
    /// Block `index` of a sequence of `tokens`.
    pub fn of_block(
        identity: &'a PrefixIdentity,
        tokens: &'a [i32],
        index: usize,
        size: usize,
    ) -> Self {
        let range = index * size..(index + 1) * size;
        Self {
            beginning: identity.beginning_in(range.clone()),
            tokens: &tokens[range],
        }
    }
}

/// A published block; `serial` is never reused, its page is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockRef {
    pub page: PageId,
    serial: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Published {
    Inserted(BlockRef),
    /// The same block is here already, in another page.
    Existing(BlockRef),
    /// Another block has the same hash; this one can't be found again.
    Collision,
}

#[derive(Debug)]
struct Block {
    hash: u64,
    serial: u64,
    parent: Parent,
    beginning: Box<[ActingAdapter]>,
    tokens: Box<[i32]>,
    children: Vec<PageId>,
    idle_since: Option<u64>,
}

impl Block {
    fn content(&self) -> Content<'_> {
        Content {
            beginning: &self.beginning,
            tokens: &self.tokens,
        }
    }
}

#[derive(Debug)]
pub struct PrefixCache<S = RandomState> {
    block_size: usize,
    hasher: S,
    by_hash: HashMap<u64, PageId>,
    /// Indexed by page.
    blocks: Vec<Option<Block>>,
    /// Tick of the last use → page.
    idle: BTreeMap<u64, PageId>,
    next_serial: u64,
}

impl PrefixCache {
    pub fn new(num_pages: usize, block_size: usize) -> Self {
        Self::with_hasher(num_pages, block_size, RandomState::new())
    }
}

impl<S: BuildHasher> PrefixCache<S> {
    fn with_hasher(num_pages: usize, block_size: usize, hasher: S) -> Self {
        let blocks = std::iter::repeat_with(|| None).take(num_pages).collect();
        Self {
            block_size,
            hasher,
            by_hash: HashMap::new(),
            blocks,
            idle: BTreeMap::new(),
            next_serial: 0,
        }
    }

    pub fn contains(&self, page: PageId) -> bool {
        self.blocks[page.index()].is_some()
    }

    pub fn num_idle(&self) -> usize {
        self.idle.len()
    }

    /// The cached blocks `tokens` start with. The last token is left out: its logits are needed.
    pub fn find(&self, identity: &PrefixIdentity, tokens: &[i32]) -> Vec<BlockRef> {
        let num_reusable = tokens.len().saturating_sub(1) / self.block_size;
        let mut parent = Parent::Root(identity.scope.clone());
        let mut found = Vec::new();
        for index in 0..num_reusable {
            let content = Content::of_block(identity, tokens, index, self.block_size);
            let Some(Ok(block)) = self.lookup(&parent, content) else {
                break;
            };
            found.push(block);
            parent = Parent::Block(block);
        }
        found
    }

    /// Makes the computed block in `page` findable.
    pub fn publish(&mut self, parent: &Parent, content: Content<'_>, page: PageId) -> Published {
        match self.lookup(parent, content) {
            Some(Ok(existing)) => Published::Existing(existing),
            Some(Err(())) => Published::Collision,
            None => Published::Inserted(self.insert(parent, content, page)),
        }
    }

    /// Nobody refers to the block any more; it may be evicted.
    pub fn mark_idle(&mut self, page: PageId, tick: u64) {
        self.block_mut(page).idle_since = Some(tick);
        let other = self.idle.insert(tick, page);
        assert_eq!(other, None, "invariant: a tick names one block");
    }

    pub fn mark_used(&mut self, page: PageId) {
        let tick = self
            .block_mut(page)
            .idle_since
            .take()
            .expect("invariant: the block was idle");
        self.idle.remove(&tick);
    }

    pub fn idle_since(&self, page: PageId) -> Option<u64> {
        self.blocks[page.index()].as_ref()?.idle_since
    }

    /// The least recently used idle block, which has no descendants, and its last use.
    pub fn oldest_idle(&self) -> Option<(PageId, u64)> {
        self.idle
            .first_key_value()
            .map(|(&tick, &page)| (page, tick))
    }

    /// Forgets an idle block and its descendants, which could not be found without it; returns their pages.
    pub fn evict(&mut self, page: PageId) -> Vec<PageId> {
        if let Parent::Block(parent) = self.block_mut(page).parent {
            self.block_mut(parent.page)
                .children
                .retain(|&child| child != page);
        }
        let mut evicted = vec![page];
        let mut next = 0;
        while next < evicted.len() {
            let block = self.blocks[evicted[next].index()]
                .take()
                .expect("invariant: the block is cached");
            let tick = block
                .idle_since
                .expect("invariant: only idle blocks are evicted");
            self.idle.remove(&tick);
            self.by_hash.remove(&block.hash);
            evicted.extend(block.children);
            next += 1;
        }
        evicted
    }

    pub fn check_invariants(&self) {
        let cached = self.blocks.iter().flatten().count();
        assert_eq!(
            cached,
            self.by_hash.len(),
            "every cached block can be found"
        );
        for (&hash, &page) in &self.by_hash {
            let block = self.blocks[page.index()]
                .as_ref()
                .expect("a found block is cached");
            assert_eq!(block.hash, hash);
            if let Some(tick) = block.idle_since {
                assert_eq!(
                    self.idle.get(&tick),
                    Some(&page),
                    "an idle block is in the idle list"
                );
            }
            if let Parent::Block(parent) = block.parent {
                self.check_link(page, block, parent);
            }
        }
        let num_idle = self
            .blocks
            .iter()
            .flatten()
            .filter(|b| b.idle_since.is_some())
            .count();
        assert_eq!(num_idle, self.idle.len());
    }

    fn check_link(&self, page: PageId, block: &Block, parent: BlockRef) {
        let above = self.blocks[parent.page.index()]
            .as_ref()
            .expect("a parent outlives its children");
        assert_eq!(
            above.serial, parent.serial,
            "a parent's page holds the parent"
        );
        assert!(
            above.children.contains(&page),
            "a parent knows its children"
        );
        if let Some(tick) = above.idle_since {
            assert!(
                block.idle_since.is_some_and(|since| since < tick),
                "an idle parent is younger"
            );
        }
    }

    /// `None` if the hash is unknown, `Err` if it belongs to another block.
    fn lookup(&self, parent: &Parent, content: Content<'_>) -> Option<Result<BlockRef, ()>> {
        let &page = self.by_hash.get(&self.hasher.hash_one((parent, content)))?;
        let block = self.blocks[page.index()]
            .as_ref()
            .expect("invariant: a found block is cached");
        let is_same = block.parent == *parent && block.content() == content;
        Some(
            is_same
                .then_some(BlockRef {
                    page,
                    serial: block.serial,
                })
                .ok_or(()),
        )
    }

    fn insert(&mut self, parent: &Parent, content: Content<'_>, page: PageId) -> BlockRef {
        let block = Block {
            hash: self.hasher.hash_one((parent, content)),
            serial: self.next_serial,
            parent: parent.clone(),
            beginning: content.beginning.into(),
            tokens: content.tokens.into(),
            children: Vec::new(),
            idle_since: None,
        };
        self.next_serial += 1;
        if let Parent::Block(parent) = parent {
            self.block_mut(parent.page).children.push(page);
        }
        let inserted = BlockRef {
            page,
            serial: block.serial,
        };
        self.by_hash.insert(block.hash, page);
        let old = self.blocks[page.index()].replace(block);
        assert!(old.is_none(), "invariant: {page:?} is published once");
        inserted
    }

    fn block_mut(&mut self, page: PageId) -> &mut Block {
        self.blocks[page.index()]
            .as_mut()
            .expect("invariant: the block is cached")
    }
}
