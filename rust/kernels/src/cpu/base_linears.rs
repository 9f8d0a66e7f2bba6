//! The model's packed linears, as adapters' gains and shifts are computed from them.
//!
//! ```text
//! norm[n] = √ Σ_k (W[n, k] + Σ_rank b[n, rank] · at[k, rank])²      W as it is stored, sums in f32, then f64
//! ```
//! On the thread that asks, in pieces: the pool's threads belong to the steps.

use std::ops::Range;
use std::sync::Arc;

use loraserve_adapters::{BaseLinears, Delta, NUM_GROUPS, StorageDtype};

use super::element::{Bf16, Element};
use super::linear::PackedLinear;
use super::panel_product::{PanelPrefetch, multiply_tile, widened};
use super::simd::{Isa, Kernel, LANES, Simd};
use crate::KernelError;
use crate::error::check_length;

/// Products of one call, a quarter of a millisecond.
const PRODUCTS_PER_CALL: usize = 4 << 20;
/// Squares along K that are summed in f32.
const CHUNK: usize = 64;

/// Fused weights, index `layer * NUM_GROUPS + group`.
pub struct CpuBaseLinears {
    isa: Isa,
    linears: Vec<Arc<PackedLinear>>,
}

impl CpuBaseLinears {
    /// Four linears a layer, in the order of groups; `isa` as of `Isa::choose`.
    pub fn new(isa: Isa, linears: Vec<Arc<PackedLinear>>) -> Result<Self, KernelError> {
        check_length("linears modulo 4", linears.len() % NUM_GROUPS, 0)?;
        Ok(Self { isa, linears })
    }

    fn linear(
        &self,
        layer: usize,
        group: usize,
        rows: &Range<usize>,
    ) -> Result<&PackedLinear, String> {
        let linear = self.linears.get(layer * NUM_GROUPS + group);
        let linear = linear.ok_or_else(|| format!("there is no layer {layer}"))?;
        if rows.start < rows.end && rows.end <= linear.out_features() {
            return Ok(linear);
        }
        Err(format!(
            "rows {rows:?} of a weight that has {}",
            linear.out_features()
        ))
    }
}

impl BaseLinears for CpuBaseLinears {
    fn row_norms(&self, delta: &Delta<'_>) -> Result<Vec<f32>, String> {
        let linear = self.linear(delta.layer, delta.group, &delta.rows)?;
        let lengths = [
            ("A", delta.at.len(), linear.in_features() * delta.rank),
            ("B", delta.b.len(), delta.rows.len() * delta.rank),
        ];
        for (what, len, expected) in lengths {
            check_length(what, len, expected).map_err(|error| error.to_string())?;
        }
        Ok(row_norms(self.isa, linear, delta))
    }

    fn rows_per_call(&self, in_features: usize, rank: usize) -> usize {
        let rows = PRODUCTS_PER_CALL / (in_features * rank).max(1);
        (rows / LANES * LANES).max(LANES)
    }

    fn bias(&self, layer: usize, group: usize, rows: Range<usize>) -> Result<Vec<f32>, String> {
        let bias = self.linear(layer, group, &rows)?.bias();
        let bias = bias.ok_or("the base's linear has no bias")?;
        Ok(bias[rows].to_vec())
    }
}

fn row_norms(isa: Isa, linear: &PackedLinear, delta: &Delta<'_>) -> Vec<f32> {
    let (rows, rank) = (&delta.rows, delta.rank);
    let mut panel_b = vec![0.0; rank * LANES];
    let mut norms = Vec::with_capacity(rows.len());
    for panel in rows.start / LANES..rows.end.div_ceil(LANES) {
        let first = panel * LANES;
        let lanes = rows.start.max(first)..rows.end.min(first + LANES);
        for row in lanes.clone() {
            let row_b = &delta.b[(row - rows.start) * rank..][..rank];
            for (r, value) in row_b.iter().enumerate() {
                panel_b[r * LANES + row - first] = *value;
            }
        }
        let k = linear.in_features();
        let squares = match linear.dense_dtype() {
            Some(StorageDtype::Float32) => {
                let panel = linear.panel::<f32>(panel);
                squares(isa, (panel, k), delta, &panel_b)
            }
            Some(StorageDtype::BFloat16) => {
                let panel = linear.panel::<Bf16>(panel);
                squares(isa, (panel, k), delta, &panel_b)
            }
            Some(StorageDtype::Float16) => unreachable!("no packed linear is float16"),
            None => {
                let panels = linear.quantized().expect("what is not dense is quantised");
                let panel = panels.widened(panel, k);
                squares(isa, (panel.as_ptr(), k), delta, &panel_b)
            }
        };
        let lanes = lanes.start - first..lanes.end - first;
        norms.extend(squares[lanes].iter().map(|square| square.sqrt() as f32));
    }
    norms
}

/// Of the rows of one panel; `b` [rank][16].
fn squares<E: Element>(
    isa: Isa,
    (panel, in_features): (*const E, usize),
    delta: &Delta<'_>,
    b: &[f32],
) -> [f64; LANES] {
    let mut squares = [0.0; LANES];
    let kernel = PanelNorms::<E> {
        panel,
        in_features,
        rank: delta.rank,
        at: delta.at,
        b,
        squares: &mut squares,
    };
    // SAFETY: `isa` is supported; the panel is the linear's; the lengths of at and b were checked.
    unsafe { isa.dispatch(kernel) };
    squares
}

/// Sums of squares of sixteen rows.
struct PanelNorms<'a, E> {
    panel: *const E,
    in_features: usize,
    rank: usize,
    /// [K, rank]
    at: &'a [f32],
    /// [rank][16]
    b: &'a [f32],
    squares: &'a mut [f64; LANES],
}

impl<E: Element> Kernel for PanelNorms<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(mut self) {
        // SAFETY: every tile ends at or before K.
        unsafe {
            for first in (0..self.in_features).step_by(CHUNK) {
                let end = self.in_features.min(first + CHUNK);
                let (mut sum, mut k) = (S::zero(), first);
                if S::WIDE {
                    while k + 8 <= end {
                        sum = self.tile::<S, 8>(k, sum);
                        k += 8;
                    }
                }
                while k + 4 <= end {
                    sum = self.tile::<S, 4>(k, sum);
                    k += 4;
                }
                while k < end {
                    sum = self.tile::<S, 1>(k, sum);
                    k += 1;
                }
                let mut lanes = [0.0; LANES];
                S::store(lanes.as_mut_ptr(), sum);
                for (square, lane) in self.squares.iter_mut().zip(lanes) {
                    *square += f64::from(lane);
                }
            }
        }
    }
}

impl<E: Element> PanelNorms<'_, E> {
    /// Adds the squares at k … k + R.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize>(&mut self, k: usize, mut sum: S::V) -> S::V {
        const NOTHING: PanelPrefetch<1> = PanelPrefetch {
            from: [std::ptr::null()],
            step: 0,
        };
        // SAFETY: at has R rows from k on, b `rank` vectors, the panel K columns of sixteen.
        unsafe {
            let at = self.at.as_ptr().add(k * self.rank);
            let delta =
                multiply_tile::<S, f32, R, 1>(at, self.rank, [self.b.as_ptr()], NOTHING, self.rank);
            for (r, delta) in delta.iter().enumerate() {
                let weight = widened(self.panel, k + r);
                let value = S::add(S::load(weight.as_ptr()), delta[0]);
                sum = S::fma(value, value, sum);
            }
            sum
        }
    }
}
