//! What a thread attends next, prefetched while it computes.
//!
//! Pages are scattered, so that the hardware can't foresee where a stream goes on. Blocks are asked for a
//! whole key block before they are read, and into L2: prefetches to L1 are bounded by the core's few line
//! buffers.

use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
use std::ops::Range;

use super::tiles::KEY_BLOCK;
use super::{QueryRows, Share};
use crate::cpu::element::Element;
use crate::geometry::BLOCK_SIZE;

/// Bytes of a cache line.
const LINE: usize = 64;

/// K blocks, then V blocks, of one head in some pages of a sequence: what is still to be prefetched.
pub(super) struct BlockPrefetch<'a, 'b, E: Element> {
    rows: &'a QueryRows<'b, E>,
    head: usize,
    k_pages: Range<usize>,
    v_pages: Range<usize>,
}

impl<'a, 'b, E: Element> BlockPrefetch<'a, 'b, E> {
    pub fn new(rows: &'a QueryRows<'b, E>, head: usize, pages: Range<usize>) -> Self {
        Self {
            rows,
            head,
            k_pages: pages.clone(),
            v_pages: pages,
        }
    }

    /// The first key block of a task.
    pub fn of(share: &'a Share<'b, E>) -> Self {
        let Share { rows, heads } = share;
        let num_keys = rows.num_visible(rows.num_rows - 1).min(KEY_BLOCK);
        Self::new(rows, heads.start, 0..num_keys.div_ceil(BLOCK_SIZE))
    }
}

impl<E: Element> Iterator for BlockPrefetch<'_, '_, E> {
    type Item = *const u8;

    #[inline]
    fn next(&mut self) -> Option<*const u8> {
        let block = match self.k_pages.next() {
            Some(page) => self.rows.k_block(self.head, page),
            None => self.rows.v_block(self.head, self.v_pages.next()?),
        };
        Some(block.cast())
    }
}

/// Prefetches to L2 a block of D·32 bytes.
#[inline]
pub(super) fn prefetch_block(block: *const u8, head_dim: usize) {
    for line in (0..2 * BLOCK_SIZE * head_dim).step_by(LINE) {
        // SAFETY: a hint, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(block.wrapping_add(line).cast()) }
    }
}
