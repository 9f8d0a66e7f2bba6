//! `LoRA` on the embedding and on the head.
//!
//! ```text
//! embedding   out [t, :] += Σ over waves of weight·scale·A [:, id]ᵀ · Bᵀ     in f32, one rounding
//! head        a projection of a layer after the last, over the sampled rows
//! ```

use std::marker::PhantomData;

use loraserve_adapters::EmbeddingLoraLayout;

use super::element::{Element, load_first, store_first};
use super::lora::Projection;
use super::panel_product::widened;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::step::{CpuStep, Segment};
use super::threads::{Shareable, ThreadPool};
use crate::KernelError;
use crate::error::check_length;

/// The step's segments as ranges of some of its rows, of adapters that have the projection.
pub(super) fn segments_of_rows(
    step: &CpuStep,
    rows: &[i32],
    projection: Projection,
) -> Result<Vec<Segment>, KernelError> {
    let has_it = |segment: &&Segment| {
        let group = segment
            .adapter
            .layout
            .group(projection.layer, projection.group);
        group.is_some()
    };
    let mut segments = step.segments.iter().filter(has_it).peekable();
    if segments.peek().is_some() && !rows.is_sorted() {
        let message = "rows with logits of a step with LoRA on the head must ascend";
        return Err(KernelError::Invalid(message.into()));
    }
    let row_of = |token: usize| rows.partition_point(|&index| (index as usize) < token);
    let over_rows = segments.map(|segment| Segment {
        start: row_of(segment.start),
        end: row_of(segment.end),
        ..segment.clone()
    });
    Ok(over_rows
        .filter(|segment| segment.start < segment.end)
        .collect())
}

/// One adapter's part of a token's embedding.
#[derive(Clone, Copy)]
struct Term {
    /// Addresses of A and B.
    a: usize,
    b: usize,
    layout: EmbeddingLoraLayout,
    token_id: usize,
    /// The segment's weight times the adapter's scale.
    scale: f32,
}

/// Adds `LoRA` on the embedding to `out` [T, K].
pub(super) fn add_embedding_loras<E: Element, O: Element>(
    pool: &ThreadPool,
    isa: Isa,
    step: &CpuStep,
    width: usize,
    out: &mut [O],
) -> Result<(), KernelError> {
    // In order of waves, so that a token's terms are.
    let mut terms: Vec<(usize, Term)> = Vec::new();
    for segment in step.segments.iter().filter(|segment| segment.acts()) {
        let Some(layout) = segment.adapter.layout.embedding_lora else {
            continue;
        };
        check_length("width of an adapter's embedding", layout.width, width)?;
        for place in segment.start..segment.end {
            let token_id = step.token_ids()[place] as usize;
            if token_id < layout.num_tokens {
                let base = segment.adapter.base;
                let term = Term {
                    a: base + layout.a_offset,
                    b: base + layout.b_offset,
                    layout,
                    token_id,
                    scale: segment.weight * layout.scale,
                };
                terms.push((place, term));
            }
        }
    }
    terms.sort_by_key(|(place, _)| *place);
    let tokens: Vec<_> = terms.chunk_by(|(a, _), (b, _)| a == b).collect();
    let shared = Shareable::new(out);
    pool.run(tokens.len(), &|index| {
        let place = tokens[index][0].0;
        let task = TokenTask {
            out: shared.get().wrapping_add(place * width),
            width,
            terms: tokens[index],
            of: PhantomData::<E>,
        };
        // SAFETY: `isa` is supported; `set_adapter` checked that the extents hold A and B; tasks have rows of their
        // own of `out`.
        unsafe { isa.dispatch(task) }
    });
    Ok(())
}

/// All terms of one token.
struct TokenTask<'a, E, O> {
    out: *mut O,
    width: usize,
    terms: &'a [(usize, Term)],
    of: PhantomData<E>,
}

impl<E: Element, O: Element> Kernel for TokenTask<'_, E, O> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `width` elements are writable; panels are those of the layouts.
        unsafe {
            for first in (0..self.width).step_by(LANES) {
                let count = (self.width - first).min(LANES);
                let out = self.out.add(first);
                let mut sum = load_first::<S, O>(out, count);
                for (_, term) in self.terms {
                    sum = term.add::<S, E>(first, sum);
                }
                store_first::<S, O>(out, count, sum);
            }
        }
    }
}

impl Term {
    /// Adds its sixteen elements from `first` on.
    ///
    /// # Safety
    /// As for `Simd`: A and B have panels as the layout says.
    #[inline(always)]
    unsafe fn add<S: Simd, E: Element>(&self, first: usize, mut sum: S::V) -> S::V {
        let panels = (
            self.layout.a_panels(E::DTYPE),
            self.layout.b_panels(E::DTYPE),
        );
        // SAFETY: ranks, the token and these elements are in the panels.
        unsafe {
            let b = (self.b as *const E).add(panels.1.index(first, 0));
            for ranks in (0..self.layout.rank).step_by(LANES) {
                let a = (self.a as *const E).add(panels.0.index(ranks, 0));
                let of_token = widened(a, self.token_id);
                for (rank, value) in (ranks..self.layout.rank).zip(of_token) {
                    let column = widened(b, rank);
                    sum = S::fma(S::splat(self.scale * value), S::load(column.as_ptr()), sum);
                }
            }
            sum
        }
    }
}
