//! Many adapters in few rows: they are added one after another, so that each B is read in one stretch,
//! and while one is read the next is fetched.

use std::ops::Range;

use super::plan::{Expansion, Item};
use super::{Element, Lora, RANK_BLOCK};
use crate::cpu::simd::amx::{Next, Row, TILE, Tiles};

/// What one module of an item adds to up to 16 rows.
struct Piece<'a> {
    item: &'a Item,
    module: &'a Expansion,
    rows: Range<usize>,
    panels: Range<usize>,
}

impl Piece<'_> {
    fn b(&self) -> Next {
        Next {
            address: self.module.b_panel(self.panels.start),
            nbytes: self.panels.len() * self.module.panel_nbytes,
        }
    }
}

impl<E: Element> Lora<'_, E> {
    /// Adds what the items add to `rows` and `panels`, in the same order and arithmetic as terms do.
    /// `acc` holds the rows, `stride` floats apart, of 16 sums per panel.
    ///
    /// # Safety
    /// As for `Simd`: tiles are supported, `wait` has returned, `acc` is writable.
    pub(in crate::cpu) unsafe fn add_each(
        &self,
        rows: Range<usize>,
        panels: Range<usize>,
        acc: *mut f32,
        stride: usize,
    ) {
        let mut tiles = TilesOfShape::default();
        let mut pieces = self.pieces(rows.clone(), panels.clone()).peekable();
        while let Some(piece) = pieces.next() {
            let next = pieces.peek().map_or(Next::NOTHING, Piece::b);
            let (row, panel) = (
                piece.rows.start - rows.start,
                piece.panels.start - panels.start,
            );
            // SAFETY: the piece lies within the caller's rows and panels, whose accumulators hold it.
            unsafe {
                self.add_piece(
                    &mut tiles,
                    &piece,
                    acc.add(row * stride + panel * TILE),
                    stride,
                    next,
                );
            }
        }
    }

    /// What the items add to `rows` and `panels`, item by item.
    fn pieces(&self, rows: Range<usize>, panels: Range<usize>) -> impl Iterator<Item = Piece<'_>> {
        self.plan.items_of(rows.clone()).flat_map(move |item| {
            let (first, end) = (item.rows.start.max(rows.start), item.rows.end.min(rows.end));
            let panels = panels.clone();
            self.plan
                .expansions_of(item)
                .iter()
                .flat_map(move |module| {
                    let own =
                        module.panels.start.max(panels.start)..module.panels.end.min(panels.end);
                    let rows = if own.is_empty() {
                        first..first
                    } else {
                        first..end
                    };
                    rows.step_by(TILE).map(move |row| Piece {
                        item,
                        module,
                        rows: row..end.min(row + TILE),
                        panels: own.clone(),
                    })
                })
        })
    }

    /// Adds s · Bᵀ of a piece to `c`, block by block along K.
    unsafe fn add_piece(
        &self,
        tiles: &mut TilesOfShape,
        piece: &Piece<'_>,
        c: *mut f32,
        stride: usize,
        next: Next,
    ) {
        let Piece { item, module, .. } = piece;
        let s = item.s_offset + (piece.rows.start - item.rows.start) * item.s_stride;
        let x = self.s.get().wrapping_add(s + module.s_column);
        let (num_rows, num_panels) = (piece.rows.len(), piece.panels.len());
        let b = module.b_panel(piece.panels.start);
        let mut widened = [0.0; RANK_BLOCK];
        for first in (0..module.rank).step_by(RANK_BLOCK) {
            let k = (module.rank - first).min(RANK_BLOCK);
            let next = if first == 0 { next } else { Next::NOTHING };
            let x = x.wrapping_add(first);
            let b = b.wrapping_add(first * TILE * size_of::<E>());
            // SAFETY: k elements of s and of B are there; 16 sums a panel and row are writable.
            unsafe {
                if num_rows == 1 {
                    let row = Row::widen(x.cast(), k, widened.as_mut_ptr());
                    row.add::<64>(b, module.panel_nbytes, num_panels, c, next);
                } else {
                    tiles.get(num_rows, k).add(
                        x.cast(),
                        item.s_stride * size_of::<E>(),
                        b,
                        module.panel_nbytes,
                        num_panels,
                        c,
                        stride * size_of::<f32>(),
                        next,
                    );
                }
            }
        }
    }
}

/// Tiles of the shape last asked for; configuring them takes as long as some products.
#[derive(Default)]
struct TilesOfShape(Option<(Tiles, usize, usize)>);

impl TilesOfShape {
    /// # Safety
    /// As for `Tiles::of_rows_and_k`.
    unsafe fn get(&mut self, num_rows: usize, k: usize) -> &Tiles {
        if self
            .0
            .as_ref()
            .is_none_or(|tiles| (tiles.1, tiles.2) != (num_rows, k))
        {
            drop(self.0.take());
            // SAFETY: the caller's contract.
            self.0 = Some((unsafe { Tiles::of_rows_and_k(num_rows, k) }, num_rows, k));
        }
        &self.0.as_ref().expect("just configured").0
    }
}
