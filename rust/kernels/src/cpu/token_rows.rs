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
fn acting<T>(
    step: &CpuStep,
    of: impl Fn(&BoundAdapter) -> Option<T>,
) -> impl Iterator<Item = (&Segment, T)> {
    let acting = step.segments.iter().filter(|segment| segment.acts());
    acting.filter_map(move |segment| Some((segment, of(&segment.adapter)?)))
}

/// Embeddings that a step's adapters have of their own.
pub(super) struct OwnEmbeddings<'a> {
    adapters: Vec<TokenRows<'a>>,
    /// Place in the step, ascending, and with it the adapter and its row.
    places: Vec<usize>,
    rows: Vec<(usize, usize)>,
}

impl<'a> OwnEmbeddings<'a> {
    pub fn of(step: &'a CpuStep, dtype: StorageDtype, width: usize) -> Result<Self, KernelError> {
        let (mut found, mut adapters) = (Vec::new(), Vec::new());
        for (segment, layout) in acting(step, |adapter| adapter.layout.embedding) {
            check_length("width of an adapter's embedding", layout.width, width)?;
            let rows = TokenRows::of(&segment.adapter, layout, dtype);
            for place in segment.start..segment.end {
                if let Ok(row) = rows.tokens.binary_search(&step.token_ids()[place]) {
                    found.push((place, (adapters.len(), row)));
                }
            }
            adapters.push(rows);
        }
        found.sort_unstable();
        if let Some(pair) = found.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let message = format!("token {} has embeddings of two adapters", pair[0].0);
            return Err(KernelError::Invalid(message));
        }
        let (places, rows) = found.into_iter().unzip();
        Ok(Self {
            adapters,
            places,
            rows,
        })
    }

    pub fn places(&self) -> &[usize] {
        &self.places
    }

    /// Puts them into `out` [T, K].
    pub fn write<E: Element, O: Element>(&self, pool: &ThreadPool, width: usize, out: &mut [O]) {
        let shared = Shareable::new(out);
        pool.run(self.places.len(), &|index| {
            let (place, (adapter, row)) = (self.places[index], self.rows[index]);
            // SAFETY: `out` has a row for each of the step's tokens, and no two tasks have the same.
            let out =
                unsafe { std::slice::from_raw_parts_mut(shared.get().add(place * width), width) };
            let rows = &self.adapters[adapter].rows;
            rows.unpack_row::<E, O>(row, out);
        });
    }
}

/// Memory of `Heads::replace`, kept from step to step.
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

/// Rows with logits of one adapter with a head of its own.
struct HeadRows<'a> {
    adapter: &'a BoundAdapter,
    rows: Vec<usize>,
}

/// What a step's adapters replace of the logits of some of its rows.
pub(super) struct Heads<'a> {
    heads: Vec<HeadRows<'a>>,
    num_rows: usize,
}

impl<'a> Heads<'a> {
    pub fn of(step: &'a CpuStep, indices: &[i32]) -> Self {
        let mut heads: Vec<HeadRows<'a>> = Vec::new();
        let has_own = |adapter: &BoundAdapter| {
            let layout = &adapter.layout;
            (layout.head.is_some() || layout.vocabulary.is_some()).then_some(())
        };
        for (segment, ()) in acting(step, has_own) {
            let tokens = segment.start..segment.end;
            let rows = indices.iter().enumerate();
            let rows = rows.filter(|(_, index)| tokens.contains(&(**index as usize)));
            let rows = rows.map(|(row, _)| row);
            let adapter = &segment.adapter;
            match heads
                .iter_mut()
                .find(|head| head.adapter.base == adapter.base)
            {
                Some(head) => head.rows.extend(rows),
                None => heads.push(HeadRows {
                    adapter,
                    rows: rows.collect(),
                }),
            }
        }
        heads.retain(|head| !head.rows.is_empty());
        Self {
            heads,
            num_rows: indices.len(),
        }
    }

    /// Whether no row has a logit of the base's head, which has `vocabulary` tokens, left.
    pub fn replace_all(&self, vocabulary: usize) -> bool {
        let whole = |head: &&HeadRows<'_>| {
            let layout = &head.adapter.layout;
            let vocabulary = layout.vocabulary.unwrap_or(vocabulary);
            layout.head.is_some_and(|rows| rows.count == vocabulary)
        };
        let rows = self.heads.iter().filter(whole).map(|head| head.rows.len());
        rows.sum::<usize>() == self.num_rows
    }

    /// Overwrites their columns of `logits` [L, N], of the rows `hidden` [L, K]; what a row's adapter has
    /// no token for becomes -∞. `vocabulary`: tokens of the base's head.
    pub fn replace<E: Element>(
        &self,
        pool: &ThreadPool,
        isa: Isa,
        (hidden, width): (&[E], usize),
        vocabulary: usize,
        scratch: &mut HeadScratch,
        logits: &mut [f32],
    ) -> Result<(), KernelError> {
        let num_columns = logits.len() / self.num_rows.max(1);
        if num_columns > vocabulary {
            for row in logits.chunks_exact_mut(num_columns) {
                row[vocabulary..].fill(f32::NEG_INFINITY);
            }
        }
        for head in &self.heads {
            if let Some(layout) = head.adapter.layout.head {
                check_length("width of an adapter's head", layout.width, width)?;
                let own = TokenRows::of(head.adapter, layout, E::DTYPE);
                head.overwrite(pool, isa, hidden, &own, scratch, (logits, num_columns))?;
            }
            let end = head.adapter.layout.vocabulary.unwrap_or(num_columns);
            for row in &head.rows {
                let row = &mut logits[row * num_columns..][..num_columns];
                row[end.min(num_columns)..].fill(f32::NEG_INFINITY);
            }
        }
        Ok(())
    }
}

impl HeadRows<'_> {
    /// One product for all of its rows.
    fn overwrite<E: Element>(
        &self,
        pool: &ThreadPool,
        isa: Isa,
        hidden: &[E],
        own: &TokenRows<'_>,
        scratch: &mut HeadScratch,
        (logits, num_columns): (&mut [f32], usize),
    ) -> Result<(), KernelError> {
        let (width, count) = (own.rows.in_features(), own.tokens.len());
        for token in own.tokens {
            check_below("token of a head", (*token).into(), num_columns as i64)?;
        }
        let x = grown::<E>(&mut scratch.hidden, self.rows.len() * width);
        for (row, x) in self.rows.iter().zip(x.chunks_exact_mut(width)) {
            x.copy_from_slice(&hidden[row * width..][..width]);
        }
        let out = grown::<f32>(&mut scratch.logits, self.rows.len() * count);
        gemm(pool, isa, x, &own.rows, None, Epilogue::Store, out)?;
        let shared = Shareable::new(logits);
        let scatter = |index: usize| {
            let first = self.rows[index] * num_columns;
            // SAFETY: the row exists and is this task's; tokens are columns of it.
            let row =
                unsafe { std::slice::from_raw_parts_mut(shared.get().add(first), num_columns) };
            for (token, logit) in own.tokens.iter().zip(&out[index * count..]) {
                row[*token as usize] = *logit;
            }
        };
        if out.len() >= MANY_LOGITS {
            pool.run(self.rows.len(), &scatter);
        } else {
            (0..self.rows.len()).for_each(scatter);
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
