//! Rotates q and k, and writes k and v to their pages.
//!
//! Halves of a head rotate together: (x₁, x₂) → (x₁·cos − x₂·sin, x₂·cos + x₁·sin).

use super::element::{Element, load_first, store_first};
use super::memory::PageMemory;
use super::norm::norm_row;
use super::simd::{Isa, Kernel, LANES, Simd};
use super::step::CpuStep;
use super::threads::{Shareable, ThreadPool};
use crate::KernelError;
use crate::error::{check_below, check_length};
use crate::geometry::{BLOCK_SIZE, KvGeometry};

/// Tokens a task handles: a page's, because the tokens of a page share the cache lines of its K.
const TOKENS_PER_TASK: usize = BLOCK_SIZE;

/// What rotates and normalises the heads.
#[derive(Clone, Copy)]
pub struct HeadTransform<'a, E> {
    /// [`max_position`, D]: D/2 cosines, then D/2 sines.
    pub cos_sin: &'a [f32],
    /// Weights [D] of a per-head `RMSNorm` before the rotation.
    pub q_norm: Option<&'a [E]>,
    pub k_norm: Option<&'a [E]>,
    pub eps: f32,
}

struct Rope<'a, E: Element> {
    qkv: Shareable<E>,
    layer: usize,
    geometry: &'a KvGeometry,
    memory: PageMemory,
    step: &'a CpuStep,
    transform: HeadTransform<'a, E>,
}

/// Rotates q and k of `qkv` [T, (H + 2·KV)·D] in place; K and V go to the pages of `layer`.
pub fn rope_and_cache<E: Element>(
    pool: &ThreadPool,
    isa: Isa,
    geometry: &KvGeometry,
    memory: PageMemory,
    step: &CpuStep,
    layer: usize,
    transform: HeadTransform<'_, E>,
    qkv: &mut [E],
) -> Result<(), KernelError> {
    let num_tokens = step.num_tokens();
    check_length("qkv", qkv.len(), num_tokens * geometry.qkv_features())?;
    if let Some(slot) = step.repeated_slot {
        let message =
            format!("slot mapping names slot {slot} twice, tokens need slots of their own");
        return Err(KernelError::Invalid(message));
    }
    check_below("layer", layer as i64, geometry.num_layers as i64)?;
    let num_positions = transform.cos_sin.len() / geometry.head_dim;
    check_below("position", step.max_position.into(), num_positions as i64)?;
    for norm in [transform.q_norm, transform.k_norm].into_iter().flatten() {
        check_length("q/k norm weight", norm.len(), geometry.head_dim)?;
    }
    let job = Rope {
        qkv: Shareable::new(qkv),
        layer,
        geometry,
        memory,
        step,
        transform,
    };
    pool.run(num_tokens.div_ceil(TOKENS_PER_TASK), &|index| {
        let task = Task { job: &job, index };
        // SAFETY: `isa` is supported; lengths were checked above and by `CpuStep::new`; every token
        // has its own row of qkv and its own slot in the pages, as no slot is repeated.
        unsafe { isa.dispatch(task) }
    });
    Ok(())
}

struct Task<'a, E: Element> {
    job: &'a Rope<'a, E>,
    index: usize,
}

impl<E: Element> Kernel for Task<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let first = self.index * TOKENS_PER_TASK;
        let end = (first + TOKENS_PER_TASK).min(self.job.step.num_tokens());
        for token in first..end {
            // SAFETY: the token exists.
            unsafe { self.job.token::<S>(token, token == first) }
        }
    }
}

impl<E: Element> Rope<'_, E> {
    fn slot(&self, token: usize) -> usize {
        self.step.arrays.slot_mapping[token] as usize
    }

    /// `is_first`: of its task.
    #[inline(always)]
    unsafe fn token<S: Simd>(&self, token: usize, is_first: bool) {
        let KvGeometry {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = *self.geometry;
        let position = self.step.arrays.positions[token] as usize;
        // SAFETY: the row holds H + 2·KV heads; the position is inside `cos_sin`.
        unsafe {
            let row = self.qkv.get().add(token * self.geometry.qkv_features());
            let cos_sin = self.transform.cos_sin.as_ptr().add(position * head_dim);
            if is_first || self.slot(token) / BLOCK_SIZE != self.slot(token - 1) / BLOCK_SIZE {
                self.prefetch::<S>(token);
            }
            for head in 0..num_heads + num_kv_heads {
                let x = row.add(head * head_dim);
                let is_query = head < num_heads;
                let norm = if is_query {
                    self.transform.q_norm
                } else {
                    self.transform.k_norm
                };
                if let Some(weight) = norm {
                    norm_row::<S, E, E>(x, weight.as_ptr(), self.transform.eps, head_dim, x);
                }
                rotate::<S, E>(x, cos_sin, head_dim / 2);
            }
            self.write(token, row.add(num_heads * head_dim));
        }
    }

    /// Asks for the cache lines of K that the token's page has for it and its successors.
    #[inline(always)]
    unsafe fn prefetch<S: Simd>(&self, token: usize) {
        let slot = self.slot(token);
        let page = self.memory.page::<E>(slot / BLOCK_SIZE);
        let pack_len = BLOCK_SIZE * E::PACK;
        for head in 0..self.geometry.num_kv_heads {
            let k = page.wrapping_add(self.geometry.k_offset(self.layer, head));
            for pack in 0..self.geometry.head_dim / E::PACK {
                // SAFETY: a hint.
                unsafe { S::prefetch(k.wrapping_add(pack * pack_len).cast()) }
            }
        }
    }

    /// Copies the token's K heads and V heads, which follow each other at `kv`, to its page.
    #[inline(always)]
    unsafe fn write(&self, token: usize, kv: *const E) {
        let slot = self.slot(token);
        let (page, lane) = (slot / BLOCK_SIZE, slot % BLOCK_SIZE);
        let (heads, head_dim) = (self.geometry.num_kv_heads, self.geometry.head_dim);
        let page = self.memory.page::<E>(page);
        // SAFETY: the page exists and holds the blocks of this layer; head_dim is a multiple of PACK.
        unsafe {
            for head in 0..heads {
                let k = kv.add(head * head_dim);
                let k_block = page.add(self.geometry.k_offset(self.layer, head));
                for pack in 0..head_dim / E::PACK {
                    let src = k.add(pack * E::PACK);
                    let dst = k_block.add((pack * BLOCK_SIZE + lane) * E::PACK);
                    std::ptr::copy_nonoverlapping(src, dst, E::PACK);
                }
                let v = kv.add((heads + head) * head_dim);
                let v_block = page.add(self.geometry.v_offset(self.layer, head));
                std::ptr::copy_nonoverlapping(v, v_block.add(lane * head_dim), head_dim);
            }
        }
    }
}

#[inline(always)]
unsafe fn rotate<S: Simd, E: Element>(x: *mut E, cos_sin: *const f32, half: usize) {
    // SAFETY: the head and its row of `cos_sin` hold 2·half elements.
    unsafe {
        for i in (0..half).step_by(LANES) {
            let n = (half - i).min(LANES);
            let cos = load_first::<S, f32>(cos_sin.add(i), n);
            let sin = load_first::<S, f32>(cos_sin.add(half + i), n);
            let x1 = load_first::<S, E>(x.add(i), n);
            let x2 = load_first::<S, E>(x.add(half + i), n);
            let y1 = S::sub(S::mul(x1, cos), S::mul(x2, sin));
            let y2 = S::add(S::mul(x2, cos), S::mul(x1, sin));
            store_first::<S, E>(x.add(i), n, y1);
            store_first::<S, E>(x.add(half + i), n, y2);
        }
    }
}
