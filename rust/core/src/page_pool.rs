//! `PagePool`: who has which page. KV blocks come from the low end, adapter extents from the high end.
//!
//! ```text
//! page 0                                                        num_pages
//!   | KV KV .. KV KV .. .. .. .. .. | extent 3 | .. | extent 0 | extent 1 |
//! ```

use std::ops::Range;

use crate::ids::{PageId, SlotId};
use crate::page_set::PageSet;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    Free,
    /// A KV block; without references it is kept by the prefix cache alone.
    Block {
        refs: u32,
    },
    Extent(SlotId),
}

/// Contiguous pages holding one adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub first_page: PageId,
    pub num_pages: usize,
}

impl Extent {
    pub fn pages(self) -> Range<usize> {
        self.first_page.index()..self.first_page.index() + self.num_pages
    }
}

/// A copy of an idle extent; source and destination may overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Move {
    pub slot: SlotId,
    pub src_page: PageId,
    pub dst_page: PageId,
    pub num_pages: usize,
}

#[derive(Debug)]
pub struct PagePool {
    states: Vec<PageState>,
    free: PageSet,
    extents: Vec<Option<Extent>>,
    free_slots: Vec<SlotId>,
    num_used_blocks: usize,
    num_extent_pages: usize,
}

impl PagePool {
    pub fn new(num_pages: usize) -> Self {
        Self {
            states: vec![PageState::Free; num_pages],
            free: PageSet::full(num_pages),
            extents: Vec::new(),
            free_slots: Vec::new(),
            num_used_blocks: 0,
            num_extent_pages: 0,
        }
    }

    pub fn num_pages(&self) -> usize {
        self.states.len()
    }

    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// KV blocks that sequences refer to.
    pub fn num_used_blocks(&self) -> usize {
        self.num_used_blocks
    }

    /// Extents taken and not freed.
    pub fn num_extents(&self) -> usize {
        self.extents.len() - self.free_slots.len()
    }

    pub fn num_extent_pages(&self) -> usize {
        self.num_extent_pages
    }

    pub fn state(&self, page: PageId) -> PageState {
        self.states[page.index()]
    }

    pub fn extent(&self, slot: SlotId) -> Extent {
        self.extents[slot.index()].expect("invariant: the slot holds an extent")
    }

    /// The lowest free page, with one reference.
    pub fn take_block(&mut self) -> Option<PageId> {
        let page = self.free.pop_lowest()?;
        self.states[page.index()] = PageState::Block { refs: 1 };
        self.num_used_blocks += 1;
        Some(page)
    }

    /// Adds a reference; true if there was none before.
    pub fn share_block(&mut self, page: PageId) -> bool {
        let refs = self.block_refs(page);
        *refs += 1;
        let was_idle = *refs == 1;
        self.num_used_blocks += usize::from(was_idle);
        was_idle
    }

    /// Drops a reference; true if none is left. The page stays a block until `free_block`.
    pub fn unref_block(&mut self, page: PageId) -> bool {
        let refs = self.block_refs(page);
        assert!(
            *refs > 0,
            "invariant: {page:?} is released once per reference"
        );
        *refs -= 1;
        let is_idle = *refs == 0;
        self.num_used_blocks -= usize::from(is_idle);
        is_idle
    }

    pub fn free_block(&mut self, page: PageId) {
        assert_eq!(
            *self.block_refs(page),
            0,
            "invariant: only an idle block is freed"
        );
        self.states[page.index()] = PageState::Free;
        self.free.insert(page);
    }

    /// The highest `num_pages` free pages in a row, under a new slot.
    pub fn take_extent(&mut self, num_pages: usize) -> Option<SlotId> {
        let first_page = self.free.highest_run(num_pages)?;
        let slot = self.free_slots.pop().unwrap_or_else(|| {
            self.extents.push(None);
            SlotId(self.extents.len() as u32 - 1)
        });
        self.place(
            slot,
            Extent {
                first_page,
                num_pages,
            },
        );
        Some(slot)
    }

    pub fn free_extent(&mut self, slot: SlotId) {
        self.lift(slot);
        self.free_slots.push(slot);
    }

    /// Moves that pack idle extents upwards until `num_pages` free pages lie in a row; `None` if no packing does.
    ///
    /// Blocks and extents that `is_movable` refuses stay where they are.
    pub fn plan_compaction(
        &self,
        num_pages: usize,
        is_movable: impl Fn(SlotId) -> bool,
    ) -> Option<Vec<Move>> {
        if self.free.len() < num_pages {
            return None;
        }
        self.regions(|state| match state {
            PageState::Free => true,
            PageState::Block { .. } => false,
            PageState::Extent(slot) => is_movable(slot),
        })
        .into_iter()
        .filter(|region| self.num_free_in(region.clone()) >= num_pages)
        .map(|region| self.pack_upwards(region))
        .min_by_key(|moves| moves.iter().map(|m| m.num_pages).sum::<usize>())
    }

    pub fn apply_move(&mut self, m: Move) {
        let extent = self.lift(m.slot);
        assert_eq!(
            extent.first_page, m.src_page,
            "invariant: a move starts where the extent lies"
        );
        self.place(
            m.slot,
            Extent {
                first_page: m.dst_page,
                num_pages: m.num_pages,
            },
        );
    }

    /// Maximal ranges of pages whose states all pass `is_soft`.
    pub fn regions(&self, is_soft: impl Fn(PageState) -> bool) -> Vec<Range<usize>> {
        let mut regions = Vec::new();
        let mut start = None;
        for (page, &state) in self.states.iter().enumerate() {
            if is_soft(state) {
                start.get_or_insert(page);
            } else if let Some(start) = start.take() {
                regions.push(start..page);
            }
        }
        regions.extend(start.map(|start| start..self.states.len()));
        regions
    }

    pub fn check_invariants(&self) {
        for (page, &state) in self.states.iter().enumerate() {
            let is_free = self.free.contains(PageId(page as u32));
            assert_eq!(
                state == PageState::Free,
                is_free,
                "page {page} is free in both books"
            );
        }
        let mut num_extent_pages = 0;
        for (slot, extent) in self.extents.iter().enumerate() {
            let slot = SlotId(slot as u32);
            assert_eq!(
                extent.is_none(),
                self.free_slots.contains(&slot),
                "{slot:?} is free or holds"
            );
            for page in extent.iter().flat_map(|extent| extent.pages()) {
                assert_eq!(
                    self.states[page],
                    PageState::Extent(slot),
                    "page {page} has one owner"
                );
                num_extent_pages += 1;
            }
        }
        let counted = |is: fn(&PageState) -> bool| self.states.iter().filter(|s| is(s)).count();
        assert_eq!(
            counted(|s| matches!(s, PageState::Extent(_))),
            num_extent_pages
        );
        assert_eq!(self.num_extent_pages, num_extent_pages);
        assert_eq!(
            counted(|s| matches!(s, PageState::Block { refs: 1.. })),
            self.num_used_blocks
        );
    }

    fn block_refs(&mut self, page: PageId) -> &mut u32 {
        match &mut self.states[page.index()] {
            PageState::Block { refs } => refs,
            state => panic!("invariant: {page:?} is a KV block, it is {state:?}"),
        }
    }

    fn place(&mut self, slot: SlotId, extent: Extent) {
        for page in extent.pages() {
            self.free.remove(PageId(page as u32));
            self.states[page] = PageState::Extent(slot);
        }
        self.num_extent_pages += extent.num_pages;
        self.extents[slot.index()] = Some(extent);
    }

    fn lift(&mut self, slot: SlotId) -> Extent {
        let extent = self.extents[slot.index()]
            .take()
            .expect("invariant: the slot holds an extent");
        for page in extent.pages() {
            self.states[page] = PageState::Free;
            self.free.insert(PageId(page as u32));
        }
        self.num_extent_pages -= extent.num_pages;
        extent
    }

    fn num_free_in(&self, region: Range<usize>) -> usize {
        self.states[region]
            .iter()
            .filter(|&&state| state == PageState::Free)
            .count()
    }

    /// Moves, highest first so that none overwrites another's source.
    fn pack_upwards(&self, region: Range<usize>) -> Vec<Move> {
        let mut moves = Vec::new();
        let (mut src, mut dst) = (region.end, region.end);
        while src > region.start {
            let PageState::Extent(slot) = self.states[src - 1] else {
                src -= 1;
                continue;
            };
            let num_pages = self.extent(slot).num_pages;
            src -= num_pages;
            dst -= num_pages;
            if src != dst {
                let (src_page, dst_page) = (PageId(src as u32), PageId(dst as u32));
                moves.push(Move {
                    slot,
                    src_page,
                    dst_page,
                    num_pages,
                });
            }
        }
        moves
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_from_the_low_end_and_extents_from_the_high_end() {
        let mut pool = PagePool::new(10);
        assert_eq!(pool.take_block(), Some(PageId(0)));
        let slot = pool.take_extent(3).unwrap();
        assert_eq!(pool.extent(slot).first_page, PageId(7));
        assert_eq!(pool.take_block(), Some(PageId(1)));
        pool.check_invariants();
    }

    #[test]
    fn shared_block_is_idle_only_after_its_last_release() {
        let mut pool = PagePool::new(2);
        let page = pool.take_block().unwrap();
        assert!(!pool.share_block(page));
        assert!(!pool.unref_block(page));
        assert!(pool.unref_block(page));
        assert_eq!((pool.num_free(), pool.num_used_blocks()), (1, 0));
        assert!(pool.share_block(page));
        assert!(pool.unref_block(page));
        pool.free_block(page);
        assert_eq!(pool.num_free(), 2);
    }

    #[test]
    #[should_panic(expected = "released once per reference")]
    fn releasing_a_block_twice_panics() {
        let mut pool = PagePool::new(2);
        let page = pool.take_block().unwrap();
        pool.unref_block(page);
        pool.unref_block(page);
    }

    #[test]
    fn compaction_joins_free_pages_around_idle_extents() {
        let mut pool = PagePool::new(10);
        let slots: Vec<_> = (0..5).map(|_| pool.take_extent(2).unwrap()).collect();
        pool.free_extent(slots[1]);
        pool.free_extent(slots[3]);
        assert_eq!(pool.take_extent(4), None);
        let moves = pool.plan_compaction(4, |_| true).unwrap();
        for m in moves {
            pool.apply_move(m);
        }
        pool.check_invariants();
        let slot = pool.take_extent(4).unwrap();
        assert_eq!(pool.extent(slot).first_page, PageId(0));
    }

    #[test]
    fn compaction_never_moves_an_extent_in_use() {
        let mut pool = PagePool::new(10);
        let slots: Vec<_> = (0..5).map(|_| pool.take_extent(2).unwrap()).collect();
        pool.free_extent(slots[1]);
        pool.free_extent(slots[3]);
        assert_eq!(pool.plan_compaction(4, |slot| slot != slots[2]), None);
    }

    #[test]
    fn compaction_picks_the_region_with_the_least_to_move() {
        let mut pool = PagePool::new(12);
        let slots: Vec<_> = [1, 3, 1, 1, 1, 1]
            .map(|n| pool.take_extent(n).unwrap())
            .to_vec();
        // from the top: e0[11] e1[8..11] e2[7] e3[6] e4[5] e5[4], free 0..4
        for _ in 0..4 {
            pool.take_block();
        }
        pool.free_extent(slots[0]);
        pool.free_extent(slots[2]);
        pool.free_extent(slots[3]);
        pool.free_extent(slots[5]);
        let moves = pool.plan_compaction(3, |_| true).unwrap();
        assert_eq!(moves.len(), 2);
        let moves = pool.plan_compaction(3, |slot| slot != slots[1]).unwrap();
        assert_eq!(
            moves,
            [Move {
                slot: slots[4],
                src_page: PageId(5),
                dst_page: PageId(7),
                num_pages: 1
            }]
        );
    }
}
