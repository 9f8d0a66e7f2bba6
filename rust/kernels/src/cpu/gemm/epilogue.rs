//! What becomes of a product's sums y [M, N]: they are stored, or gate and up meet in the cache.

use std::ops::Range;

use super::{Gemm, PANELS_PER_TILE};
use crate::KernelError;
use crate::cpu::activation::GatedRows;
use crate::cpu::element::Element;
use crate::cpu::linear::PackedLinear;
use crate::cpu::memory::Scratch;
use crate::cpu::simd::{Isa, LANES};
use crate::error::{check_below, check_length};

/// Bytes of gate and up that wait for each other in L2.
const GATED_NBYTES: usize = 1 << 18;

/// What the output of a product holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Epilogue {
    /// y [M, N].
    Store,
    /// y in the first N columns of [M, columns]; the others stay.
    StoreWithin { columns: usize },
    /// silu(gate)·up [M, N / 2] of y = [gate, up], each rounded to the output's type first; N is a
    /// multiple of 32, so that gate and up have panels of their own.
    SiluMul,
}

impl Epilogue {
    /// Refuses a product with `weight` that it can't follow.
    pub fn check(self, weight: &PackedLinear) -> Result<(), KernelError> {
        match self {
            Epilogue::Store => Ok(()),
            Epilogue::StoreWithin { columns } => {
                let limit = columns as i64 + 1;
                check_below("columns of a product", weight.out_features() as i64, limit)
            }
            Epilogue::SiluMul => {
                let rest = weight.out_features() % (2 * LANES);
                check_length("gated output modulo 32", rest, 0)
            }
        }
    }

    /// Projections fused in y that make one output: gate and up, or y itself.
    pub fn num_projections(self) -> usize {
        match self {
            Epilogue::Store | Epilogue::StoreWithin { .. } => 1,
            Epilogue::SiluMul => 2,
        }
    }

    /// Columns of the output of a product with `weight`.
    pub fn out_columns(self, weight: &PackedLinear) -> usize {
        match self {
            Epilogue::StoreWithin { columns } => columns,
            Epilogue::Store | Epilogue::SiluMul => weight.out_features() / self.num_projections(),
        }
    }
}

/// Where sums go.
#[derive(Clone, Copy)]
pub(super) struct Target<O> {
    base: *mut O,
    row_stride: usize,
    /// What `base` points to.
    first_row: usize,
    first_column: usize,
}

impl<O> Target<O> {
    /// Where the sum at `row` and `column` goes.
    pub fn at(&self, row: usize, column: usize) -> *mut O {
        let offset = (row - self.first_row) * self.row_stride + column - self.first_column;
        self.base.wrapping_add(offset)
    }
}

impl<E: Element, O: Element> Gemm<'_, E, O> {
    /// Computes rows and panels of the output.
    ///
    /// # Safety
    /// `isa` is supported; rows and panels are those of a task.
    pub(super) unsafe fn run(&self, isa: Isa, rows: Range<usize>, panels: Range<usize>) {
        // SAFETY: the caller's contract.
        unsafe {
            match self.epilogue {
                Epilogue::Store | Epilogue::StoreWithin { .. } => self.store(isa, rows, panels),
                Epilogue::SiluMul => self.silu_mul(isa, rows, panels),
            }
        }
    }

    /// The sums themselves.
    unsafe fn store(&self, isa: Isa, rows: Range<usize>, panels: Range<usize>) {
        let target = Target {
            base: self.out.get(),
            row_stride: self.epilogue.out_columns(self.weight),
            first_row: 0,
            first_column: 0,
        };
        // SAFETY: the caller's contract.
        unsafe { self.run_part(isa, rows, panels, target) }
    }

    /// Gate and up of some columns, side by side in scratch, then of the next; `gates` are the gate's
    /// panels, and up's go with them.
    unsafe fn silu_mul(&self, isa: Isa, rows: Range<usize>, gates: Range<usize>) {
        let column_nbytes = rows.len() * 2 * LANES * size_of::<O>();
        let num_panels = (GATED_NBYTES / column_nbytes)
            .next_multiple_of(PANELS_PER_TILE)
            .clamp(
                PANELS_PER_TILE,
                gates.len().next_multiple_of(PANELS_PER_TILE),
            );
        let mut scratch = Scratch::take((num_panels * column_nbytes).div_ceil(size_of::<f32>()));
        let gate: *mut O = scratch.as_mut_ptr().cast();
        let out_stride = self.num_panels * LANES;
        for first in gates.clone().step_by(num_panels) {
            let count = (gates.end - first).min(num_panels);
            let width = count * LANES;
            // SAFETY: scratch holds `count` panels of gate and of up; both exist, as do the columns.
            unsafe {
                let up = gate.add(width);
                for (base, panel) in [(gate, first), (up, first + self.num_panels)] {
                    let target = Target {
                        base,
                        row_stride: 2 * width,
                        first_row: rows.start,
                        first_column: panel * LANES,
                    };
                    self.run_part(isa, rows.clone(), panel..panel + count, target);
                }
                isa.dispatch(GatedRows {
                    gate,
                    up,
                    stride: 2 * width,
                    width,
                    num_rows: rows.len(),
                    out: self.out.get().add(rows.start * out_stride + first * LANES),
                    out_stride,
                });
            }
        }
    }
}
