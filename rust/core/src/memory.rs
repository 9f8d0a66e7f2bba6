//! `Memory`: one pool for KV blocks and adapters; makes room by giving up what is idle and worth least.

use std::ops::Range;

use crate::adapter_cache::AdapterCache;
use crate::ids::{AdapterId, PageId, PrefixIdentity, SlotId};
use crate::page_pool::{Extent, Move, PagePool, PageState};
use crate::prefix_cache::{Content, Parent, PrefixCache, Published};
use crate::slot_table::Shield;

/// A sequence's pages in token order. Given back with `Memory::release_table`.
#[derive(Debug)]
pub struct BlockTable {
    pub pages: Vec<PageId>,
    num_published: usize,
    /// What the next full block follows; `None` once a block could not be published.
    last_published: Option<Parent>,
}

pub struct Memory {
    pub pool: PagePool,
    pub adapters: AdapterCache,
    prefix: PrefixCache,
    prefix_caching: bool,
    max_num_slots: usize,
    block_size: usize,
    /// Counts releases: the time scale of recency.
    clock: u64,
    num_evictions: u64,
}

impl Memory {
    pub fn new(
        num_pages: usize,
        block_size: usize,
        prefix_caching: bool,
        max_num_slots: usize,
    ) -> Self {
        Self {
            pool: PagePool::new(num_pages),
            adapters: AdapterCache::default(),
            prefix: PrefixCache::new(num_pages, block_size),
            prefix_caching,
            max_num_slots,
            block_size,
            clock: 0,
            num_evictions: 0,
        }
    }

    /// Adapters evicted so far.
    pub fn num_evictions(&self) -> u64 {
        self.num_evictions
    }

    pub fn num_cached_pages(&self) -> usize {
        self.prefix.num_idle()
    }

    /// Pages that are free or can be made so without touching a shielded adapter.
    pub fn available(&self) -> usize {
        let adapters = self.adapters.slots.evictable(Shield::Respect);
        let adapter_pages: usize = adapters
            .map(|(slot, _)| self.pool.extent(slot).num_pages)
            .sum();
        self.pool.num_free() + self.prefix.num_idle() + adapter_pages
    }

    /// Whether more than `headroom` pages are free or cached, in nobody's use.
    pub fn has_unowned(&self, headroom: usize) -> bool {
        self.pool.num_free() + self.prefix.num_idle() > headroom
    }

    /// Pages for all of `tokens`, cached ones first, of `max_cached` tokens at most, if `headroom` pages stay available;
    /// and how many tokens were cached.
    pub fn take_table(
        &mut self,
        identity: &PrefixIdentity,
        tokens: &[i32],
        max_cached: usize,
        headroom: usize,
    ) -> Option<(BlockTable, usize)> {
        let mut table = self.take_cached(identity, tokens, max_cached);
        let num_cached = table.pages.len();
        let num_blocks = tokens.len().div_ceil(self.block_size);
        if self.available() < num_blocks - num_cached + headroom {
            self.release_table(table);
            return None;
        }
        for _ in num_cached..num_blocks {
            let grown = self.grow_table(&mut table, Shield::Respect);
            assert!(grown, "invariant: available pages can be taken");
        }
        Some((table, num_cached * self.block_size))
    }

    /// Adds a page; false if there is none to be had.
    pub fn grow_table(&mut self, table: &mut BlockTable, shield: Shield) -> bool {
        let page = loop {
            if let Some(page) = self.pool.take_block() {
                break page;
            }
            if !self.evict_least_worth(shield) {
                return false;
            }
        };
        table.pages.push(page);
        true
    }

    /// Makes the full blocks among the first `num_computed` tokens findable, and shares those that others computed too.
    pub fn publish(
        &mut self,
        table: &mut BlockTable,
        identity: &PrefixIdentity,
        tokens: &[i32],
        num_computed: usize,
    ) {
        while (table.num_published + 1) * self.block_size <= num_computed {
            let Some(parent) = &table.last_published else {
                return;
            };
            let index = table.num_published;
            let content = Content::of_block(identity, tokens, index, self.block_size);
            let page = table.pages[index];
            table.last_published = match self.prefix.publish(parent, content, page) {
                Published::Inserted(block) => Some(Parent::Block(block)),
                Published::Existing(block) => {
                    self.share(block.page);
                    self.release_page(page);
                    table.pages[index] = block.page;
                    Some(Parent::Block(block))
                }
                Published::Collision => None,
            };
            table.num_published += 1;
        }
    }

    /// Children first, so that among idle blocks the end of a prefix is older than its start.
    pub fn release_table(&mut self, table: BlockTable) {
        for page in table.pages.into_iter().rev() {
            self.release_page(page);
        }
    }

    /// Reserves an extent for the adapter if `headroom` pages stay available; `moves` come first on the device.
    pub fn begin_load(
        &mut self,
        adapter: AdapterId,
        headroom: usize,
        moves: &mut Vec<Move>,
    ) -> Option<(SlotId, Extent)> {
        let num_pages = self.adapters.entry(adapter).num_pages;
        if self.available() < num_pages + headroom {
            return None;
        }
        let slot = self.take_extent(num_pages, moves)?;
        self.adapters.begin_load(adapter, slot);
        Some((slot, self.pool.extent(slot)))
    }

    pub fn release_adapter(&mut self, slot: SlotId) {
        let tick = self.tick();
        self.adapters.slots.release(slot, tick);
    }

    pub fn free_slot(&mut self, slot: Option<SlotId>) {
        if let Some(slot) = slot {
            self.pool.free_extent(slot);
        }
    }

    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Checks every book against `owned`, the pages of all running sequences, a page once per owner.
    pub fn check_invariants(&self, owned: impl Iterator<Item = PageId>) {
        self.pool.check_invariants();
        self.prefix.check_invariants();
        self.adapters.check_invariants();
        let mut owners = vec![0; self.pool.num_pages()];
        owned.for_each(|page| owners[page.index()] += 1);
        for (page, &owners) in owners.iter().enumerate() {
            let page = PageId(page as u32);
            match self.pool.state(page) {
                PageState::Block { refs } => {
                    assert_eq!(refs, owners, "references of {page:?} are its owners");
                    assert_eq!(
                        refs == 0,
                        self.prefix.idle_since(page).is_some(),
                        "{page:?} has an owner or is cached"
                    );
                }
                state => {
                    assert_eq!(owners, 0, "{page:?} of a sequence is a block");
                    assert!(
                        !self.prefix.contains(page),
                        "a cached page is a block, {page:?} is {state:?}"
                    );
                    if let PageState::Extent(slot) = state {
                        assert!(
                            self.adapters.slots.occupant(slot).is_some(),
                            "an extent belongs to an adapter"
                        );
                    }
                }
            }
        }
    }

    fn take_cached(
        &mut self,
        identity: &PrefixIdentity,
        tokens: &[i32],
        max_cached: usize,
    ) -> BlockTable {
        let mut found = if self.prefix_caching {
            self.prefix.find(identity, tokens)
        } else {
            Vec::new()
        };
        found.truncate(max_cached / self.block_size);
        let root = Parent::Root(identity.scope.clone());
        let last = found.last().map_or(root, |&block| Parent::Block(block));
        for block in &found {
            self.share(block.page);
        }
        BlockTable {
            num_published: found.len(),
            pages: found.into_iter().map(|block| block.page).collect(),
            last_published: self.prefix_caching.then_some(last),
        }
    }

    fn share(&mut self, page: PageId) {
        if self.pool.share_block(page) {
            self.prefix.mark_used(page);
        }
    }

    fn release_page(&mut self, page: PageId) {
        if !self.pool.unref_block(page) {
            return;
        }
        if self.prefix.contains(page) {
            let tick = self.tick();
            self.prefix.mark_idle(page, tick);
        } else {
            self.pool.free_block(page);
        }
    }

    /// What an idle page is worth keeping, blocks and adapters on one scale: the chance of use falls as one over
    /// the age. The least worth goes first.
    fn worth(&self, last_use: u64) -> f64 {
        let age = self.clock - last_use;
        1.0 / (1.0 + age as f64)
    }

    /// False if nothing is idle.
    fn evict_least_worth(&mut self, shield: Shield) -> bool {
        let block = self
            .prefix
            .oldest_idle()
            .map(|(page, since)| (page, self.worth(since)));
        match (block, self.least_worth_adapter(shield)) {
            (None, None) => return false,
            (Some((_, worth)), Some((slot, least))) if least < worth => self.evict_adapter(slot),
            (None, Some((slot, _))) => self.evict_adapter(slot),
            (Some((page, _)), _) => self.evict_block(page),
        }
        true
    }

    fn least_worth_adapter(&self, shield: Shield) -> Option<(SlotId, f64)> {
        let adapters = self.adapters.slots.evictable(shield);
        let worths = adapters.map(|(slot, occupant)| (slot, self.worth(occupant.last_use)));
        worths.min_by(|(_, a), (_, b)| a.total_cmp(b))
    }

    fn evict_adapter(&mut self, slot: SlotId) {
        self.adapters.evict(slot);
        self.pool.free_extent(slot);
        self.num_evictions += 1;
    }

    fn evict_block(&mut self, page: PageId) {
        for page in self.prefix.evict(page) {
            self.pool.free_block(page);
        }
    }

    /// A free run, else one made by moving idle adapters, else one cleared of the least worth, else both.
    fn take_extent(&mut self, num_pages: usize, moves: &mut Vec<Move>) -> Option<SlotId> {
        if self.pool.num_extents() >= self.max_num_slots {
            let (slot, _) = self.least_worth_adapter(Shield::Respect)?;
            self.evict_adapter(slot);
        }
        if let Some(slot) = self.pool.take_extent(num_pages) {
            return Some(slot);
        }
        if !self.compact(num_pages, moves) {
            if let Some(window) = self.least_worth_window(num_pages) {
                self.clear(window);
            } else {
                let region = self.clearable_region(num_pages)?;
                self.clear(region);
                self.compact(num_pages, moves);
            }
        }
        self.pool.take_extent(num_pages)
    }

    fn compact(&mut self, num_pages: usize, moves: &mut Vec<Move>) -> bool {
        let planned = self
            .pool
            .plan_compaction(num_pages, |slot| self.adapters.slots.is_idle(slot));
        let Some(planned) = planned else {
            return false;
        };
        for &m in &planned {
            self.pool.apply_move(m);
        }
        moves.extend(planned);
        true
    }

    /// The `num_pages` in a row, all free or evictable, whose loss costs least.
    fn least_worth_window(&self, num_pages: usize) -> Option<Range<usize>> {
        // Worth of all pages below, and how many of them must stay.
        let mut below = vec![(0.0, 0)];
        for page in 0..self.pool.num_pages() {
            let (sum, num_hard) = below[page];
            let worth = self.page_worth(PageId(page as u32));
            below.push((
                sum + worth.unwrap_or(0.0),
                num_hard + usize::from(worth.is_none()),
            ));
        }
        let ends = below.iter().skip(num_pages);
        let windows = below
            .iter()
            .zip(ends)
            .map(|(start, end)| (end.0 - start.0, end.1 - start.1))
            .enumerate();
        let clearable = windows.filter(|&(_, (_, num_hard))| num_hard == 0);
        let (first, _) = clearable.min_by(|(_, a), (_, b)| a.0.total_cmp(&b.0))?;
        Some(first..first + num_pages)
    }

    /// 0 for a free page, `None` for one that must stay.
    fn page_worth(&self, page: PageId) -> Option<f64> {
        match self.pool.state(page) {
            PageState::Free => Some(0.0),
            PageState::Block { .. } => self.prefix.idle_since(page).map(|since| self.worth(since)),
            PageState::Extent(slot) if self.adapters.slots.is_evictable(slot, Shield::Respect) => {
                let occupant = self.adapters.slots.occupant(slot)?;
                Some(self.worth(occupant.last_use))
            }
            PageState::Extent(_) => None,
        }
    }

    /// The smallest region that has room once its idle pages are given up and its shielded adapters moved.
    fn clearable_region(&self, num_pages: usize) -> Option<Range<usize>> {
        let regions = self.pool.regions(|state| match state {
            PageState::Free => true,
            PageState::Block { refs } => refs == 0,
            PageState::Extent(slot) => self.adapters.slots.is_idle(slot),
        });
        let room = |region: &Range<usize>| {
            region
                .clone()
                .filter(|&page| self.page_worth(PageId(page as u32)).is_some())
                .count()
        };
        regions
            .into_iter()
            .filter(|region| room(region) >= num_pages)
            .min_by_key(Range::len)
    }

    fn clear(&mut self, pages: Range<usize>) {
        for page in pages {
            let page = PageId(page as u32);
            match self.pool.state(page) {
                PageState::Block { refs: 0 } => self.evict_block(page),
                PageState::Extent(slot)
                    if self.adapters.slots.is_evictable(slot, Shield::Respect) =>
                {
                    self.evict_adapter(slot);
                }
                _ => {}
            }
        }
    }
}
