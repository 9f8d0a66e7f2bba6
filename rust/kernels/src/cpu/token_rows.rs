//! Rows of embedding and head that a step's adapters replace.
//!
//! ```text
//! embedding   out [token, :] = own row             where the token's adapter has one for its id
//! head        logits [row, id] = hidden [row] · own row [id]      over all rows of an adapter together
//! ```
//! The products are those of the dense weights, in the same order of sums, so a row that says what the base's says
//! gives the base's logit.

use loraserve_adapters::{RowsLayout, StorageDtype};

use super::element::Element;
use super::gemm::{Epilogue, gemm};
use super::linear::PackedLinear;
use super::memory::AlignedBytes;
use super::simd::Isa;
use super::step::{BoundAdapter, CpuStep, Segment};
use super::threads::{Shareable, ThreadPool};
use crate::KernelError;
use crate::error::{check_below, check_length};

/// Logits from which on they are brought to their columns by all threads.
const MANY_LOGITS: usize = 1 << 15;

/// Some tokens' rows, where an adapter has them.
struct TokenRows<'a> {
    /// Ascending.
    tokens: &'a [i32],
    rows: PackedLinear,
}

impl<'a> TokenRows<'a> {
    fn of(adapter: &'a BoundAdapter, layout: RowsLayout, dtype: StorageDtype) -> Self {
        let address = adapter.base + layout.tokens_offset;
        // SAFETY: `set_adapter` checked that the extent holds tokens and panels, which stay while a step runs.
        unsafe {
            Self {
                tokens: std::slice::from_raw_parts(address as *const i32, layout.count),
                rows: PackedLinear::at(
                    adapter.base + layout.panels_offset,
                    dtype,
                    layout.width,
                    layout.count,
                ),
            }
        }
    }
}

/// Segments whose adapter acts, with what `of` finds of it.
fn acting(
    step: &CpuStep,
    of: impl Fn(&BoundAdapter) -> Option<RowsLayout>,
) -> impl Iterator<Item = (&Segment, RowsLayout)> {
    let acts = |segment: &&Segment| segment.weight != 0.0;
    let segments = step.segments.iter().filter(acts);
    segments.filter_map(move |segment| Some((segment, of(&segment.adapter)?)))
}

/// Puts adapters' own rows into `out` [T, K].
pub(super) fn replace_embeddings<E: Element>(
    pool: &ThreadPool,
    step: &CpuStep,
    width: usize,
    out: &mut [E],
) -> Result<(), KernelError> {
    let mut found = Vec::new();
    let mut adapters = Vec::new();
    for (segment, layout) in acting(step, |adapter| adapter.layout.embedding) {
        check_length("width of an adapter's embedding", layout.width, width)?;
        let rows = TokenRows::of(&segment.adapter, layout, E::DTYPE);
        for place in segment.start..segment.end {
            if let Ok(row) = rows.tokens.binary_search(&step.token_ids()[place]) {
                found.push((place, adapters.len(), row));
            }
        }
        adapters.push(rows);
    }
    found.sort_unstable_by_key(|(place, ..)| *place);
    if let Some(pair) = found.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        let message = format!("token {} has embeddings of two adapters", pair[0].0);
        return Err(KernelError::Invalid(message));
    }
    let shared = Shareable::new(out);
    pool.run(found.len(), &|index| {
        let (place, adapter, row) = found[index];
        // SAFETY: `out` has a row for each of the step's tokens, and no two tasks have the same.
        let out = unsafe { std::slice::from_raw_parts_mut(shared.get().add(place * width), width) };
        adapters[adapter].rows.unpack_row(row, out);
    });
    Ok(())
}

/// Memory of `replace_logits`, kept from step to step.
pub struct HeadScratch {
    hidden: AlignedBytes,
    logits: AlignedBytes,
}

impl Default for HeadScratch {
    fn default() -> Self {
        Self {
            hidden: AlignedBytes::zeroed(0),
            logits: AlignedBytes::zeroed(0),
        }
    }
}

/// Sampled rows of one adapter with rows of a head.
struct HeadRows<'a> {
    adapter: &'a BoundAdapter,
    layout: RowsLayout,
    rows: Vec<usize>,
}

/// What a step's adapters replace of its logits.
pub(super) struct Heads<'a> {
    heads: Vec<HeadRows<'a>>,
    num_rows: usize,
}

impl<'a> Heads<'a> {
    pub fn of(step: &'a CpuStep) -> Self {
        let mut heads: Vec<HeadRows<'a>> = Vec::new();
        for (segment, layout) in acting(step, |adapter| adapter.layout.head) {
            let tokens = segment.start..segment.end;
            let sampled = step.arrays.logits_indices.iter().enumerate();
            let rows = sampled.filter(|(_, index)| tokens.contains(&(**index as usize)));
            let rows = rows.map(|(row, _)| row);
            let adapter = &segment.adapter;
            match heads
                .iter_mut()
                .find(|head| head.adapter.base == adapter.base)
            {
                Some(head) => head.rows.extend(rows),
                None => heads.push(HeadRows {
                    adapter,
                    layout,
                    rows: rows.collect(),
                }),
            }
        }
        heads.retain(|head| !head.rows.is_empty());
        Self {
            heads,
            num_rows: step.num_logits(),
        }
    }

    /// Whether no row has a logit of the base's head left.
    pub fn replace_all(&self, num_columns: usize) -> bool {
        let whole = |head: &&HeadRows<'_>| head.layout.count == num_columns;
        let rows = self.heads.iter().filter(whole).map(|head| head.rows.len());
        rows.sum::<usize>() == self.num_rows
    }

    /// Overwrites their columns of `logits` [L, N], of the sampled rows `hidden` [L, K].
    pub fn replace<E: Element>(
        &self,
        pool: &ThreadPool,
        isa: Isa,
        hidden: &[E],
        width: usize,
        scratch: &mut HeadScratch,
        logits: &mut [f32],
    ) -> Result<(), KernelError> {
        for head in &self.heads {
            check_length("width of an adapter's head", head.layout.width, width)?;
            let own = TokenRows::of(head.adapter, head.layout, E::DTYPE);
            let count = own.tokens.len();
            let x = grown::<E>(&mut scratch.hidden, head.rows.len() * width);
            for (row, x) in head.rows.iter().zip(x.chunks_exact_mut(width)) {
                x.copy_from_slice(&hidden[row * width..][..width]);
            }
            let out = grown::<f32>(&mut scratch.logits, head.rows.len() * count);
            gemm(pool, isa, x, &own.rows, None, Epilogue::Store, out)?;
            let num_columns = logits.len() / self.num_rows;
            for token in own.tokens {
                check_below("token of a head", (*token).into(), num_columns as i64)?;
            }
            let shared = Shareable::new(&mut *logits);
            let scatter = |index: usize| {
                let first = head.rows[index] * num_columns;
                // SAFETY: the row exists and is this task's; tokens are columns of it.
                let row =
                    unsafe { std::slice::from_raw_parts_mut(shared.get().add(first), num_columns) };
                for (token, logit) in own.tokens.iter().zip(&out[index * count..]) {
                    row[*token as usize] = *logit;
                }
            };
            if out.len() >= MANY_LOGITS {
                pool.run(head.rows.len(), &scatter);
            } else {
                (0..head.rows.len()).for_each(scatter);
            }
        }
        Ok(())
    }
}

/// The first `len` elements of a buffer that grows where it must.
fn grown<T>(buffer: &mut AlignedBytes, len: usize) -> &mut [T] {
    let nbytes = len * size_of::<T>();
    if buffer.nbytes() < nbytes {
        *buffer = AlignedBytes::zeroed(nbytes + nbytes / 4);
    }
    // SAFETY: the buffer holds as many, initialised, and numbers may have any bits.
    unsafe { std::slice::from_raw_parts_mut(buffer.as_mut_ptr(), len) }
}
