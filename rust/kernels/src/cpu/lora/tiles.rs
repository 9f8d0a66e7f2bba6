//! Shrink and expand in AMX tiles.

use std::ops::Range;

use super::{Element, Lora, RANK_BLOCK, Shrink, Simd};
use crate::cpu::lora_plan::{Expansion, Item};
use crate::cpu::simd::amx::{Product, TILE, TILE_K, Term, Tiles};

/// How far ahead a shrink asks for A, all panels together.
const PREFETCH_NBYTES: usize = 4096;
/// Panels of an update.
const QUAD: usize = 4;
/// Items whose B is read side by side: a prefetcher of the hardware follows each.
const STREAMS: usize = 4;
/// How many updates ahead B is asked for: the next of the same item.
const UPDATES_AHEAD: usize = STREAMS;

/// One module's addition to some rows and up to four panels.
struct Update {
    term: Term,
    num_rows: usize,
    num_panels: usize,
    rank: usize,
    /// Floats from the first of the accumulators.
    offset: usize,
}

impl Update {
    /// Asks for its part of B.
    #[inline(always)]
    fn fetch<S: Simd>(&self) {
        let nbytes = self.num_panels * self.rank * TILE * size_of::<u16>();
        for offset in (0..nbytes).step_by(64) {
            // SAFETY: a hint; the address need not be valid.
            unsafe { S::prefetch(self.term.panels[0].wrapping_add(offset)) }
        }
    }
}

impl<E: Element> Shrink<'_, E> {
    /// # Safety
    /// As for `Simd`: tiles are supported and fit K.
    #[inline(always)]
    pub(super) unsafe fn tiles<S: Simd>(&self) {
        let rows = self.task.rows.clone();
        let mut product = Product::new();
        let c = product.0.as_mut_ptr();
        let is_few = rows.len() <= TILE;
        let (starts, width) = if is_few {
            ([rows.start; 2], 4)
        } else {
            ([rows.start, rows.end - TILE], 2)
        };
        // SAFETY: panels and rows are the task's; the product holds 32 rows of two panels and 16 of
        // four.
        unsafe {
            let tiles = if is_few {
                Tiles::of_rows(rows.len())
            } else {
                Tiles::full()
            };
            let mut panel = self.task.panels.start;
            while panel < self.task.panels.end {
                let count = self.num_wide(panel).clamp(1, width);
                let terms = [self.term(starts, panel)];
                let stride = count * TILE;
                let second = c.add((starts[1] - starts[0]) * stride);
                match (is_few, count) {
                    (true, 1) => tiles.one_by::<1, 0>(&terms, c, stride * 4),
                    (true, 2) => tiles.one_by::<2, 0>(&terms, c, stride * 4),
                    (true, 3) => tiles.one_by::<3, 0>(&terms, c, stride * 4),
                    (true, _) => tiles.one_by::<4, 0>(&terms, c, stride * 4),
                    (false, 1) => tiles.two_by::<1>(&terms, [c, second], stride * 4),
                    (false, _) => tiles.two_by::<2>(&terms, [c, second], stride * 4),
                }
                for (r, row) in rows.clone().enumerate() {
                    for p in 0..count {
                        let sums = c.add(r * stride + p * TILE);
                        self.lora.store_ranks::<S>(self.task, row, panel + p, sums);
                    }
                }
                panel += count;
            }
        }
    }

    /// Panels of 16 ranks from `panel` on.
    fn num_wide(&self, panel: usize) -> usize {
        let end = self.lora.plan.items[self.task.item].rank / TILE;
        end.min(self.task.panels.end).saturating_sub(panel)
    }

    fn term(&self, starts: [usize; 2], panel: usize) -> Term {
        let k = self.lora.in_features;
        let x = starts.map(|row| self.lora.x.as_ptr().wrapping_add(row * k).cast());
        let last = self.task.panels.end - 1;
        let panels = std::array::from_fn(|p| self.panel((panel + p).min(last)));
        let x_stride = k * size_of::<E>();
        let mut term = Term::new(x, x_stride, panels, self.panel_width(panel), k / TILE_K);
        term.ahead = PREFETCH_NBYTES / self.num_wide(panel).clamp(1, 4);
        term
    }
}

impl<E: Element> Lora<'_, E> {
    /// Items of the rows that row tiles of `num_rows` rows at `starts` cover; the tiles follow each
    /// other or overlap.
    pub(in crate::cpu) fn items_of(&self, starts: [usize; 2], num_rows: usize) -> Vec<&Item> {
        let rows = starts[0].min(starts[1])..starts[0].max(starts[1]) + num_rows;
        self.plan.items_of(rows).collect()
    }

    /// Appends the terms of `items` for up to `P` panels of these row tiles. `fetches` says whether the
    /// next panels are wanted soon.
    #[inline(always)]
    pub(in crate::cpu) fn add_terms<const P: usize>(
        &self,
        items: &[&Item],
        starts: [usize; 2],
        num_rows: usize,
        panels: &Range<usize>,
        fetches: bool,
        terms: &mut Vec<Term>,
    ) {
        for item in items {
            for module in self.plan.expansions_of(item) {
                if module.panels.start < panels.end && panels.start < module.panels.end {
                    let mut term = self.term::<P>(item, module, starts, num_rows, panels.clone());
                    term.ahead = if fetches { P * module.panel_nbytes } else { 0 };
                    terms.push(term);
                }
            }
        }
    }

    fn term<const P: usize>(
        &self,
        item: &Item,
        module: &Expansion,
        starts: [usize; 2],
        num_rows: usize,
        panels: Range<usize>,
    ) -> Term {
        let s = self.s.get().wrapping_add(item.s_offset + module.s_column);
        let x = starts.map(|start| {
            if start >= item.rows.end || start + num_rows <= item.rows.start {
                return std::ptr::null();
            }
            // A tile may begin in the gap before the item.
            let rows = start as isize - item.rows.start as isize;
            s.wrapping_offset(rows * item.s_stride as isize)
                .cast::<u8>()
        });
        let b = std::array::from_fn(|p| {
            let panel = (panels.start + p).min(panels.end - 1);
            if module.panels.contains(&panel) {
                module.b_panel(panel)
            } else {
                self.plan.zeros.as_ptr()
            }
        });
        let x_stride = item.s_stride * size_of::<E>();
        Term::new(x, x_stride, b, TILE, module.s_width() / RANK_BLOCK)
    }

    /// Adds what the items add to `rows` and `panels`, in the same order and arithmetic as terms do.
    /// `acc` holds the rows, `stride` floats apart, of 16 sums per panel.
    ///
    /// # Safety
    /// As for `Simd`: tiles are supported, `wait` has returned, `acc` is writable.
    #[inline(always)]
    pub(in crate::cpu) unsafe fn add_each<S: Simd>(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        acc: *mut f32,
        stride: usize,
    ) {
        let updates = self.updates(rows, panels, stride);
        let mut tiles: Option<(Tiles, usize, usize)> = None;
        for (index, update) in updates.iter().enumerate() {
            let term = update.term;
            if let Some(upcoming) = updates.get(index + UPDATES_AHEAD) {
                upcoming.fetch::<S>();
            }
            let k = update.rank.min(RANK_BLOCK);
            let shape = (
                update.num_rows,
                if update.rank == k { k } else { RANK_BLOCK },
            );
            // SAFETY: rows, panels and accumulators are the caller's; a term of one block has `rank`
            // elements along K.
            unsafe {
                if tiles
                    .as_ref()
                    .is_none_or(|tiles| (tiles.1, tiles.2) != shape)
                {
                    drop(tiles.take());
                    tiles = Some((Tiles::of_rows_and_k(shape.0, shape.1), shape.0, shape.1));
                }
                let tiles = &tiles.as_ref().expect("just configured").0;
                let (c, c_stride) = (acc.add(update.offset), stride * size_of::<f32>());
                match update.num_panels {
                    1 => tiles.one_by::<1, 1>(&[term], c, c_stride),
                    2 => tiles.one_by::<2, 1>(&[term], c, c_stride),
                    3 => tiles.one_by::<3, 1>(&[term], c, c_stride),
                    _ => tiles.one_by::<4, 1>(&[term], c, c_stride),
                }
            }
        }
    }

    /// The updates, those of `STREAMS` items of a wave in turns. A row has one item a wave, so its
    /// updates stay in the order of waves.
    fn updates(&self, rows: Range<usize>, panels: Range<usize>, stride: usize) -> Vec<Update> {
        let items: Vec<&Item> = self.plan.items_of(rows.clone()).collect();
        let mut ordered = Vec::with_capacity(256);
        for wave in items.chunk_by(|a, b| a.wave == b.wave) {
            for items in wave.chunks(STREAMS) {
                let each = |item: &&Item| self.updates_of(item, &rows, &panels, stride);
                let mut streams: Vec<_> = items.iter().map(each).map(Vec::into_iter).collect();
                while let Some(longest) = streams.iter().map(ExactSizeIterator::len).max()
                    && longest > 0
                {
                    ordered.extend(streams.iter_mut().filter_map(Iterator::next));
                }
            }
        }
        ordered
    }

    fn updates_of(
        &self,
        item: &Item,
        rows: &Range<usize>,
        panels: &Range<usize>,
        stride: usize,
    ) -> Vec<Update> {
        let mut updates = Vec::with_capacity(64);
        let (first, end) = (item.rows.start.max(rows.start), item.rows.end.min(rows.end));
        for row in (first..end).step_by(TILE) {
            let s = item.s_offset + (row - item.rows.start) * item.s_stride;
            for module in self.plan.expansions_of(item) {
                let x = self
                    .s
                    .get()
                    .wrapping_add(s + module.s_column)
                    .cast::<u8>()
                    .cast_const();
                let last = module.panels.end.min(panels.end);
                for panel in (module.panels.start.max(panels.start)..last).step_by(QUAD) {
                    let b = std::array::from_fn(|p| module.b_panel((panel + p).min(last - 1)));
                    let num_blocks = module.s_width() / RANK_BLOCK;
                    let x_stride = item.s_stride * size_of::<E>();
                    updates.push(Update {
                        term: Term::new([x; 2], x_stride, b, TILE, num_blocks),
                        num_rows: (end - row).min(TILE),
                        num_panels: (last - panel).min(QUAD),
                        rank: module.rank,
                        offset: (row - rows.start) * stride + (panel - panels.start) * TILE,
                    });
                }
            }
        }
        updates
    }
}
