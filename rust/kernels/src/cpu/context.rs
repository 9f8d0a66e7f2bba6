//! What every op of one model shares: threads, instructions, the page pool, the bound adapters.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loraserve_adapters::{AdapterLayout, NUM_GROUPS, RANK_MULTIPLE, StorageDtype};

use super::attention;
use super::element::Element;
use super::gemm::{Delta, gemm};
use super::geometry::{KvGeometry, PageMemory};
use super::linear::PackedLinear;
use super::lora::{LoraScratch, Projection, lora_delta};
use super::memory::advise_huge_pages;
use super::pool::ThreadPool;
use super::rope::{HeadTransform, rope_and_cache};
use super::simd::Isa;
use super::step::{BoundAdapter, Step, StepArrays};
use crate::KernelError;
use crate::error::{check_below, check_length};

/// The CPU backend of one model.
pub struct CpuContext {
    pub pool: ThreadPool,
    pub isa: Isa,
    pub dtype: StorageDtype,
    geometry: KvGeometry,
    memory: PageMemory,
    slots: Mutex<Vec<Option<BoundAdapter>>>,
    scratch: Mutex<LoraScratch>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CpuContext {
    /// `isa`: see `Isa::choose`; `num_threads`: every core when `None`.
    pub fn new(
        num_threads: Option<usize>,
        isa: Option<&str>,
        dtype: StorageDtype,
        geometry: KvGeometry,
        memory: PageMemory,
    ) -> Result<Self, KernelError> {
        geometry.check()?;
        check_length(
            "page_nbytes",
            memory.page_nbytes(),
            geometry.page_nbytes(dtype),
        )?;
        advise_huge_pages(memory.base(), memory.nbytes());
        Ok(Self {
            isa: Isa::choose(isa)?,
            pool: ThreadPool::new(num_threads),
            dtype,
            geometry,
            memory,
            slots: Mutex::default(),
            scratch: Mutex::default(),
        })
    }

    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Binds `slot` to the adapter packed at `first_page`.
    pub fn set_adapter(
        &self,
        slot: usize,
        first_page: usize,
        layout: Arc<AdapterLayout>,
    ) -> Result<(), KernelError> {
        let start = first_page * self.memory.page_nbytes();
        let limit = self.memory.nbytes() as i64 + 1;
        check_below(
            "end of the adapter's extent",
            (start + layout.nbytes) as i64,
            limit,
        )?;
        check_layout(&layout, self.dtype)?;
        let mut slots = lock(&self.slots);
        if slots.len() <= slot {
            slots.resize(slot + 1, None);
        }
        slots[slot] = Some(BoundAdapter {
            base: self.memory.base() + start,
            layout,
        });
        Ok(())
    }

    /// Moves an extent (ranges may overlap) and rebinds its slot, if an adapter is bound to it.
    pub fn move_extent(
        &self,
        slot: usize,
        src_page: usize,
        dst_page: usize,
        num_pages: usize,
    ) -> Result<(), KernelError> {
        let limit = self.memory.num_pages() as i64 + 1;
        check_below(
            "end of the extent to move",
            (src_page + num_pages) as i64,
            limit,
        )?;
        check_below(
            "end of the moved extent",
            (dst_page + num_pages) as i64,
            limit,
        )?;
        let mut slots = lock(&self.slots);
        let (src, dst) = (
            self.memory.page::<u8>(src_page),
            self.memory.page::<u8>(dst_page),
        );
        // SAFETY: both ranges lie in the pool; `copy` allows them to overlap.
        unsafe { std::ptr::copy(src, dst, num_pages * self.memory.page_nbytes()) };
        if let Some(Some(bound)) = slots.get_mut(slot) {
            bound.base = dst as usize;
        }
        Ok(())
    }

    pub fn begin_step(&self, arrays: StepArrays) -> Result<Step, KernelError> {
        let slots = lock(&self.slots);
        Step::new(arrays, &self.geometry, self.memory.num_pages(), &slots)
    }

    /// out [T, N] = x·Wᵀ + bias + what the step's adapters add at (layer, group).
    pub fn lora_linear<E: Element>(
        &self,
        step: &Step,
        x: &[E],
        linear: &PackedLinear,
        layer: usize,
        group: usize,
        out: &mut [E],
    ) -> Result<(), KernelError> {
        let projection = Projection {
            layer,
            group,
            in_features: linear.in_features(),
            out_features: linear.out_features(),
        };
        let mut scratch = lock(&self.scratch);
        let delta = lora_delta(&self.pool, self.isa, step, projection, x, &mut scratch)?;
        self.linear(x, linear, delta, out)
    }

    /// Logits of the sampled rows of `hidden` [T, K]: f32 [L, N]; `rows` is room for [L, K].
    pub fn logits<E: Element>(
        &self,
        step: &Step,
        hidden: &[E],
        lm_head: &PackedLinear,
        rows: &mut [E],
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        let width = lm_head.in_features();
        check_length("hidden", hidden.len(), step.num_tokens() * width)?;
        check_length("sampled rows", rows.len(), step.num_logits() * width)?;
        for (row, &index) in rows
            .chunks_exact_mut(width)
            .zip(&step.arrays.logits_indices)
        {
            let start = index as usize * width;
            row.copy_from_slice(&hidden[start..start + width]);
        }
        self.linear(rows, lm_head, None, out)
    }

    fn linear<E: Element, O: Element>(
        &self,
        x: &[E],
        linear: &PackedLinear,
        delta: Option<Delta<'_>>,
        out: &mut [O],
    ) -> Result<(), KernelError> {
        gemm(&self.pool, self.isa, x, linear, delta, out)
    }

    pub fn rope_and_cache<E: Element>(
        &self,
        step: &Step,
        layer: usize,
        transform: HeadTransform<'_, E>,
        qkv: &mut [E],
    ) -> Result<(), KernelError> {
        let (pool, geometry) = (&self.pool, &self.geometry);
        rope_and_cache(
            pool,
            self.isa,
            geometry,
            self.memory,
            step,
            layer,
            transform,
            qkv,
        )
    }

    pub fn attention<E: Element>(
        &self,
        step: &Step,
        layer: usize,
        qkv: &[E],
        out: &mut [E],
    ) -> Result<(), KernelError> {
        let (pool, geometry) = (&self.pool, &self.geometry);
        attention::attention(pool, self.isa, geometry, self.memory, step, layer, qkv, out)
    }
}

/// Checks that every block lies inside the extent, so that kernels may trust the offsets.
fn check_layout(layout: &AdapterLayout, dtype: StorageDtype) -> Result<(), KernelError> {
    let limit = layout.nbytes as i64 + 1;
    let end = |offset: usize, len: usize| (offset + len * dtype.size()) as i64;
    for group in layout.groups.iter().flatten() {
        check_below(
            "end of A",
            end(group.a_offset, group.rank * group.in_features),
            limit,
        )?;
        let mut next_rank = 0;
        for module in &group.modules {
            check_below(
                "end of B",
                end(module.b_offset, module.rank * module.out_features),
                limit,
            )?;
            check_length("module's rank offset", module.rank_offset, next_rank)?;
            check_length("module's rank modulo 8", module.rank % RANK_MULTIPLE, 0)?;
            next_rank += module.rank;
        }
        check_length("sum of the modules' ranks", next_rank, group.rank)?;
    }
    check_length(
        "layout's groups modulo 4",
        layout.groups.len() % NUM_GROUPS,
        0,
    )
}
