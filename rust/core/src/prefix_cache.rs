//! `PrefixCache`: full KV blocks found again by whose they are and what computed them: tokens, and adapters from where
//! they act. Blocks before the first token of every adapter are the base model's.
//!
//! A block is found by a 64-bit hash and believed only after its parent and its tokens compare equal, so a
//! collision costs a miss, never wrong KV. The hash is keyed at random: a caller who could make its blocks
//! collide with a guess at another's would learn from the miss whether the other's is there. A parent is named by a
//! number that is never reused. Whoever refers to a block refers to its parents too, and releases children first: an idle block's descendants are idle and older.

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{AdapterKey, CacheScope};
    use std::hash::{BuildHasherDefault, Hasher};

    /// Every block has the same hash.
    #[derive(Default)]
    struct Colliding;

    impl Hasher for Colliding {
        fn write(&mut self, _: &[u8]) {}

        fn finish(&self) -> u64 {
            7
        }
    }

    fn identity(content_hash: &str, weight: f32) -> PrefixIdentity {
        acting_from(0, content_hash, weight)
    }

    fn acting_from(first_token: usize, content_hash: &str, weight: f32) -> PrefixIdentity {
        let adapter = ActingAdapter {
            key: AdapterKey::new(content_hash),
            weight_bits: weight.to_bits(),
            first_token,
        };
        PrefixIdentity::new(CacheScope::default(), [adapter])
    }

    fn scoped(tenant: &str, salt: &str) -> PrefixIdentity {
        let scope = CacheScope {
            tenant: tenant.into(),
            salt: salt.into(),
        };
        PrefixIdentity::new(scope, [])
    }

    /// Publishes `tokens` in blocks of 2 into pages from `first_page` on.
    fn publish<S: BuildHasher>(
        cache: &mut PrefixCache<S>,
        identity: &PrefixIdentity,
        tokens: &[i32],
        first_page: u32,
    ) {
        let mut parent = Parent::Root(identity.scope.clone());
        for index in 0..tokens.len() / 2 {
            let page = PageId(first_page + index as u32);
            let content = Content::of_block(identity, tokens, index, 2);
            match cache.publish(&parent, content, page) {
                Published::Inserted(block) | Published::Existing(block) => {
                    parent = Parent::Block(block);
                }
                Published::Collision => break,
            }
        }
    }

    fn pages(found: &[BlockRef]) -> Vec<u32> {
        found.iter().map(|block| block.page.0).collect()
    }

    #[test]
    fn prefix_is_found_block_by_block_and_never_the_last_token() {
        let mut cache = PrefixCache::new(8, 2);
        let base = PrefixIdentity::default();
        publish(&mut cache, &base, &[1, 2, 3, 4], 0);
        assert_eq!(pages(&cache.find(&base, &[1, 2, 3, 4, 5])), [0, 1]);
        assert_eq!(pages(&cache.find(&base, &[1, 2, 3, 4])), [0]);
        assert_eq!(pages(&cache.find(&base, &[1, 2, 9, 4, 5])), [0]);
        assert_eq!(pages(&cache.find(&base, &[3, 4, 5])), [] as [u32; 0]);
    }

    #[test]
    fn prefix_of_another_adapter_or_weight_is_not_found() {
        let mut cache = PrefixCache::new(8, 2);
        publish(&mut cache, &identity("aa", 1.0), &[1, 2], 0);
        assert_eq!(pages(&cache.find(&identity("aa", 1.0), &[1, 2, 3])), [0]);
        for other in [
            identity("bb", 1.0),
            identity("aa", 0.5),
            PrefixIdentity::default(),
        ] {
            assert!(cache.find(&other, &[1, 2, 3]).is_empty());
        }
    }

    #[test]
    fn prefix_of_another_tenant_or_salt_is_not_found() {
        let scopes = [("", ""), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc")];
        let mut cache = PrefixCache::new(8, 2);
        for (page, (tenant, salt)) in scopes.into_iter().enumerate() {
            let own = scoped(tenant, salt);
            assert!(cache.find(&own, &[1, 2, 3]).is_empty());
            publish(&mut cache, &own, &[1, 2], page as u32);
            assert_eq!(pages(&cache.find(&own, &[1, 2, 3])), [page as u32]);
        }
    }

    #[test]
    fn blocks_before_an_adapter_acts_are_shared_and_those_from_there_on_are_not() {
        let mut cache = PrefixCache::new(8, 2);
        let (base, tokens) = (PrefixIdentity::default(), [1, 2, 3, 4, 5, 6, 7]);
        let from_fourth = acting_from(3, "aa", 1.0);
        publish(&mut cache, &from_fourth, &tokens, 0);
        assert_eq!(pages(&cache.find(&from_fourth, &tokens)), [0, 1, 2]);
        for other in [
            base.clone(),
            acting_from(2, "aa", 1.0),
            acting_from(3, "aa", 0.5),
            acting_from(3, "bb", 1.0),
            acting_from(4, "aa", 1.0),
        ] {
            assert_eq!(pages(&cache.find(&other, &tokens)), [0], "{other:?}");
        }
        assert!(cache.find(&acting_from(1, "aa", 1.0), &tokens).is_empty());
        publish(&mut cache, &base, &[1, 2, 3, 4], 3);
        assert_eq!(
            pages(&cache.find(&acting_from(4, "bb", 1.0), &tokens)),
            [0, 4]
        );
    }

    #[test]
    fn blocks_are_hashed_with_a_key_of_their_own_cache() {
        let root = Parent::Root(Arc::default());
        let hash = |cache: PrefixCache| cache.hasher.hash_one((&root, &[1, 2]));
        assert_ne!(
            hash(PrefixCache::new(8, 2)),
            hash(PrefixCache::new(8, 2)),
            "nobody can compute what collides"
        );
    }

    #[test]
    fn colliding_hashes_miss_instead_of_returning_wrong_blocks() {
        let mut cache = PrefixCache::with_hasher(8, 2, BuildHasherDefault::<Colliding>::default());
        let base = PrefixIdentity::default();
        publish(&mut cache, &base, &[1, 2], 0);
        assert!(cache.find(&base, &[8, 9, 1]).is_empty());
        assert!(cache.find(&identity("aa", 1.0), &[1, 2, 3]).is_empty());
        assert_eq!(
            cache.publish(
                &Parent::Root(base.scope.clone()),
                Content::of_block(&base, &[8, 9], 0, 2),
                PageId(1)
            ),
            Published::Collision
        );
        assert_eq!(pages(&cache.find(&base, &[1, 2, 3])), [0]);
    }

    #[test]
    fn evicting_a_parent_evicts_its_descendants() {
        let mut cache = PrefixCache::new(8, 2);
        let base = PrefixIdentity::default();
        publish(&mut cache, &base, &[1, 2, 3, 4, 5, 6], 0);
        publish(&mut cache, &base, &[1, 2, 7, 8], 4);
        for (tick, page) in [2, 1, 5, 0].into_iter().enumerate() {
            cache.mark_idle(PageId(page), tick as u64);
        }
        cache.check_invariants();
        assert_eq!(cache.oldest_idle(), Some((PageId(2), 0)));
        let mut evicted = cache.evict(PageId(1));
        evicted.sort();
        assert_eq!(evicted, [PageId(1), PageId(2)]);
        cache.check_invariants();
        assert_eq!(pages(&cache.find(&base, &[1, 2, 7, 8, 9])), [0, 5]);
        assert_eq!(cache.evict(PageId(0)).len(), 2);
        cache.check_invariants();
    }
}
