//! Shrink and expand of adapters whose A and B are int8, in vectors on every instruction set.
//!
//! ```text
//! shrink   s [tokens, Σ rank] = weight·scale · scales ⊙ (x [tokens, K] · Aᵀ)     in f32, not rounded
//! expand   y [tokens, module's columns] += s · Bᵀ                                in the GEMM's accumulators
//! ```
//! A pack of a panel is one k: 16 bytes, which become f32 on their way into a product. A row's sums run over
//! even and odd k apart in the shrink, in the order of ranks in the expand, however many rows a task has.

use super::{Element, Lora, Shrink};
use crate::cpu::element::load_first;
use crate::cpu::memory::Scratch;
use crate::cpu::simd::{LANES, Simd};

/// Rows whose sums share what is read of A.
const TILE_ROWS: usize = 4;

impl<E: Element> Shrink<'_, E> {
    /// # Safety
    /// As for `Simd`: the task is one of the plan, whose adapters are int8.
    #[inline(always)]
    pub(super) unsafe fn int8<S: Simd>(&self) {
        let (k, end) = (self.lora.in_features, self.task.rows.end);
        let padded_k = k.next_multiple_of(LANES);
        let mut x = Scratch::take(TILE_ROWS * padded_k);
        let x = x.as_mut_ptr();
        // SAFETY: tiles end at or before the task's last row; there is room for the rows of one.
        unsafe {
            for row in self.task.rows.clone().step_by(TILE_ROWS) {
                let num_rows = (end - row).min(TILE_ROWS);
                for r in 0..num_rows {
                    let from = self.lora.x.as_ptr().add((row + r) * k);
                    for i in (0..k).step_by(LANES) {
                        let values = load_first::<S, E>(from.add(i), (k - i).min(LANES));
                        S::store(x.add(r * padded_k + i), values);
                    }
                }
                for panel in self.task.panels.clone() {
                    if num_rows == TILE_ROWS {
                        self.int8_tile::<S, TILE_ROWS>(row, panel, (x, padded_k));
                        continue;
                    }
                    for r in 0..num_rows {
                        let x = (x.wrapping_add(r * padded_k).cast_const(), padded_k);
                        self.int8_tile::<S, 1>(row + r, panel, x);
                    }
                }
            }
        }
    }

    /// R rows of x, widened, times one panel of A.
    #[inline(always)]
    unsafe fn int8_tile<S: Simd, const R: usize>(
        &self,
        row: usize,
        panel: usize,
        (x, x_stride): (*const f32, usize),
    ) {
        let (k, width) = (self.lora.in_features, self.panel_width(panel));
        // SAFETY: rows of x hold `k` floats, the panel `k` packs of `width` bytes; a load past a narrow panel
        // stays inside the extent, see `OVERREAD`.
        unsafe {
            let a = self.panel(panel).cast::<i8>();
            let mut acc = [[S::zero(); 2]; R];
            for pair in 0..k / 2 {
                for i in 0..2 {
                    let k = 2 * pair + i;
                    let w = S::load_i8(a.add(k * width));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        acc[i] = S::fma(S::splat(*x.add(r * x_stride + k)), w, acc[i]);
                    }
                }
            }
            if k % 2 == 1 {
                let w = S::load_i8(a.add((k - 1) * width));
                for (r, acc) in acc.iter_mut().enumerate() {
                    acc[0] = S::fma(S::splat(*x.add(r * x_stride + k - 1)), w, acc[0]);
                }
            }
            let mut sums = [[0.0; LANES]; R];
            for (sums, acc) in sums.iter_mut().zip(acc) {
                S::store(sums.as_mut_ptr(), S::add(acc[0], acc[1]));
            }
            let (rows, sums) = (row..row + R, sums.as_ptr().cast());
            self.lora
                .store_ranks::<S>(self.task, rows, panel, sums, LANES);
        }
    }
}

impl<E: Element> Lora<'_, E> {
    /// Adds what int8 adapters add to `rows` and `panels`, of which `acc` holds 16 sums each, the rows `stride`
    /// floats apart.
    ///
    /// # Safety
    /// As for `expand`: `acc` is writable.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(in crate::cpu) unsafe fn expand_into<S: Simd>(
        &self,
        rows: std::ops::Range<usize>,
        panels: std::ops::Range<usize>,
        acc: *mut f32,
        stride: usize,
    ) {
        for (r, row) in rows.enumerate() {
            for (p, panel) in panels.clone().enumerate() {
                // SAFETY: the caller's contract.
                unsafe {
                    let acc = acc.add(r * stride + p * LANES);
                    let mut sums = [[S::load(acc)]];
                    self.expand::<S, 1, 1>(row, panel, &mut sums);
                    S::store(acc, sums[0][0]);
                }
            }
        }
    }
}

/// acc + s · Bᵀ of a panel of B and its `rank` elements of s.
///
/// # Safety
/// As for `Simd`: the panel has `rank` packs.
#[inline(always)]
pub(super) unsafe fn add_ranks<S: Simd>(
    s: *const f32,
    b: *const i8,
    rank: usize,
    mut acc: S::V,
) -> S::V {
    for k in 0..rank {
        // SAFETY: the caller's contract.
        acc = unsafe { S::fma(S::splat(*s.add(k)), S::load_i8(b.add(k * LANES)), acc) };
    }
    acc
}
