//! What every op of one model shares: threads, instructions, the page pool, the bound adapters.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loraserve_adapters::{
    AdapterLayout, BLOCK_ALIGN, COLUMNS_NBYTES, GroupLayout, NUM_GROUPS, OVERREAD, PANEL_WIDTH,
    RANK_MULTIPLE, StorageDtype,
};

use super::attention;
use super::element::Element;
use super::gemm::{Epilogue, gemm};
use super::linear::{self, PackedLinear};
use super::lora::{Lora, LoraScratch, Projection};
use super::memory::{Arena, PageMemory, advise_huge_pages};
use super::norm::rms_norm;
use super::rope::{HeadTransform, rope_and_cache};
use super::simd::Isa;
use super::step::{BoundAdapter, CpuStep, Owner, StepArrays, TokenRange};
use super::threads::ThreadPool;
use super::token_lora::{add_embedding_loras, segments_of_rows};
use super::token_rows::{HeadScratch, Heads, OwnEmbeddings};
use crate::KernelError;
use crate::error::{check_below, check_end, check_length, check_not_empty, check_product};
use crate::geometry::KvGeometry;

/// The CPU backend of one model.
pub struct CpuContext {
    pub pool: ThreadPool,
    pub isa: Isa,
    pub dtype: StorageDtype,
    geometry: KvGeometry,
    memory: PageMemory,
    owner: Owner,
    slots: Mutex<Vec<Option<BoundAdapter>>>,
    tokens: TokenRange,
    scratch: Mutex<LoraScratch>,
    head_scratch: Mutex<HeadScratch>,
    /// Where packed weights lie.
    pub arena: Arena,
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
            owner: Owner::default(),
            slots: Mutex::default(),
            tokens: TokenRange::ALL,
            scratch: Mutex::default(),
            head_scratch: Mutex::default(),
            arena: Arena::default(),
        })
    }

    /// The backend of a rank that has some of the tokens, and counts them from its first.
    #[must_use]
    pub fn with_tokens(self, tokens: TokenRange) -> Self {
        Self { tokens, ..self }
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
        let (page_nbytes, limit) = (self.memory.page_nbytes(), self.memory.num_pages());
        let num_pages = layout.nbytes.div_ceil(page_nbytes);
        check_end("end of the adapter's extent", first_page, num_pages, limit)?;
        // A bound slot owns a page at least, so a pool has no more slots than pages.
        check_below("slot", slot as i64, limit as i64)?;
        check_layout(&layout, self.dtype)?;
        let mut slots = lock(&self.slots);
        if slots.len() <= slot {
            slots.resize(slot + 1, None);
        }
        slots[slot] = Some(BoundAdapter {
            base: self.memory.base() + first_page * page_nbytes,
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
        let limit = self.memory.num_pages();
        check_end("end of the extent to move", src_page, num_pages, limit)?;
        check_end("end of the moved extent", dst_page, num_pages, limit)?;
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

    pub fn begin_step(&self, mut arrays: StepArrays) -> Result<CpuStep, KernelError> {
        for token in &mut arrays.token_ids {
            *token = token.saturating_sub(self.tokens.first);
        }
        let slots = lock(&self.slots);
        let (geometry, num_pages) = (&self.geometry, self.memory.num_pages());
        CpuStep::new(&self.owner, arrays, geometry, num_pages, &slots)
    }

    /// Rows of the step's tokens, from their adapters or the table, both of `E`: `out` [T, K].
    pub fn embedding<E: Element, O: Element>(
        &self,
        step: &CpuStep,
        table: &PackedLinear,
        out: &mut [O],
    ) -> Result<(), KernelError> {
        step.check_owner(&self.owner)?;
        let width = table.in_features();
        let own = OwnEmbeddings::of(step, E::DTYPE, width)?;
        let (pool, isa) = (&self.pool, self.isa);
        let token_ids = (step.token_ids(), self.tokens);
        linear::embedding::<E, O>(pool, table, token_ids, own.places(), out)?;
        own.write::<E, O>(pool, width, out);
        add_embedding_loras::<E, O>(pool, isa, step, width, out)
    }

    /// `epilogue` of y [T, N] = x·Wᵀ + bias + what the step's adapters add at (layer, group).
    pub fn lora_linear<E: Element, O: Element>(
        &self,
        step: &CpuStep,
        x: &[E],
        linear: &PackedLinear,
        layer: usize,
        group: usize,
        epilogue: Epilogue,
        out: &mut [O],
    ) -> Result<(), KernelError> {
        step.check_owner(&self.owner)?;
        let projection = Projection {
            layer,
            group,
            in_features: linear.in_features(),
            out_features: linear.out_features(),
        };
        let mut scratch = lock(&self.scratch);
        let num_threads = self.pool.num_threads();
        let rows = (&step.segments[..], step.num_tokens());
        let lora = Lora::plan(num_threads, self.isa, rows, projection, x, &mut scratch)?;
        gemm(
            &self.pool,
            self.isa,
            x,
            linear,
            lora.as_ref(),
            epilogue,
            out,
        )
    }

    /// Copies the rows `indices` of `hidden` [T, K] to `rows`.
    pub fn gather<E: Element>(
        &self,
        step: &CpuStep,
        indices: &[i32],
        (hidden, width): (&[E], usize),
        rows: &mut [E],
    ) -> Result<(), KernelError> {
        step.check_owner(&self.owner)?;
        check_length("hidden", hidden.len(), step.num_tokens() * width)?;
        check_length("rows", rows.len(), indices.len() * width)?;
        for (row, &index) in rows.chunks_exact_mut(width).zip(indices) {
            let start = index as usize * width;
            row.copy_from_slice(&hidden[start..start + width]);
        }
        Ok(())
    }

    /// Logits of the step's rows `indices`, of which `rows` [L, K] has the hidden states, of the head and of their
    /// adapters': f32 [L, the step's columns].
    pub fn logits<E: Element>(
        &self,
        step: &CpuStep,
        indices: &[i32],
        rows: &[E],
        lm_head: &PackedLinear,
        out: &mut [f32],
    ) -> Result<(), KernelError> {
        step.check_owner(&self.owner)?;
        let (width, num_rows) = (lm_head.in_features(), indices.len());
        check_length("rows with logits", rows.len(), num_rows * width)?;
        let (pool, isa, heads) = (&self.pool, self.isa, Heads::of(step, indices));
        let vocabulary = lm_head.out_features();
        let columns = step.num_columns(vocabulary);
        check_length("logits", out.len(), num_rows * columns)?;
        if !heads.replace_all(vocabulary) {
            let within = Epilogue::StoreWithin { columns };
            let projection = Projection {
                layer: self.geometry.num_layers,
                group: 0,
                in_features: width,
                out_features: vocabulary,
            };
            let segments = segments_of_rows(step, indices, projection)?;
            let segments = (&segments[..], num_rows);
            let num_threads = pool.num_threads();
            let mut scratch = lock(&self.scratch);
            let lora = Lora::plan(num_threads, isa, segments, projection, rows, &mut scratch)?;
            gemm(pool, isa, rows, lm_head, lora.as_ref(), within, out)?;
        }
        let mut scratch = lock(&self.head_scratch);
        heads.replace(pool, isa, (rows, width), vocabulary, &mut scratch, out)
    }

    /// Normalises rows anew whose adapters have a norm `index` of their own: `out` [T, K] of `x` [T, K].
    pub fn own_norms<X: Element, E: Element>(
        &self,
        step: &CpuStep,
        index: usize,
        x: &[X],
        eps: f32,
        out: &mut [E],
    ) -> Result<(), KernelError> {
        for segment in step.with_norms.iter().map(|index| &step.segments[*index]) {
            let Some(norm) = segment.adapter.layout.norm(index) else {
                continue;
            };
            step.check_owner(&self.owner)?;
            check_length("x", x.len(), step.num_tokens() * norm.width)?;
            let address = segment.adapter.base + norm.offset;
            // SAFETY: `set_adapter` checked that the extent holds the norm, which stays while a step runs.
            let weight = unsafe { std::slice::from_raw_parts(address as *const E, norm.width) };
            let rows = segment.start * norm.width..segment.end * norm.width;
            let (x, out) = (&x[rows.clone()], &mut out[rows]);
            rms_norm(&self.pool, self.isa, x, None::<&mut [X]>, weight, eps, out)?;
        }
        Ok(())
    }

    pub fn rope_and_cache<E: Element>(
        &self,
        step: &CpuStep,
        layer: usize,
        transform: HeadTransform<'_, E>,
        qkv: &mut [E],
    ) -> Result<(), KernelError> {
        step.check_owner(&self.owner)?;
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
        step: &CpuStep,
        layer: usize,
        qkv: &[E],
        out: &mut [E],
    ) -> Result<(), KernelError> {
        step.check_owner(&self.owner)?;
        let (pool, geometry) = (&self.pool, &self.geometry);
        attention::attention(pool, self.isa, geometry, self.memory, step, layer, qkv, out)
    }
}

/// Checks that every block that is there lies aligned inside the extent and that modules write columns of their
/// own, so that kernels may trust the offsets.
fn check_layout(layout: &AdapterLayout, dtype: StorageDtype) -> Result<(), KernelError> {
    // Kernels read a little past a block.
    let limit = layout.nbytes.saturating_sub(OVERREAD);
    for group in layout.groups.iter().flatten().chain(&layout.head_lora) {
        check_not_empty(!group.modules.is_empty(), "group")?;
        let panel_dtype = group.panel_dtype(dtype);
        if group.rank > 0 {
            let sizes = [group.rank, group.in_features, panel_dtype.size()];
            check_block("end of A", group.a_offset, &sizes, limit)?;
            check_block(
                "end of A",
                group.a_offset,
                &[group.a_panels(dtype).nbytes()],
                limit,
            )?;
        }
        if let Some(offset) = group.scales_offset {
            check_block("end of scales", offset, &[group.scales_nbytes()], limit)?;
        }
        let mut next_rank = 0;
        for module in &group.modules {
            if module.rank > 0 {
                let sizes = [module.rank, module.out_features, panel_dtype.size()];
                check_block("end of B", module.b_offset, &sizes, limit)?;
                let nbytes = module.b_panels(panel_dtype).nbytes();
                check_block("end of B", module.b_offset, &[nbytes], limit)?;
            }
            if let Some(columns) = module.columns {
                let sizes = [module.out_features, COLUMNS_NBYTES / PANEL_WIDTH];
                check_block("end of columns", columns.offset, &sizes, limit)?;
                let nbytes = module.columns_nbytes();
                check_block("end of columns", columns.offset, &[nbytes], limit)?;
            }
            check_not_empty(module.rank > 0 || module.columns.is_some(), "module")?;
            check_length("module's rank offset", module.rank_offset, next_rank)?;
            check_length("module's rank modulo 8", module.rank % RANK_MULTIPLE, 0)?;
            next_rank = check_end(
                "end of the module's ranks",
                next_rank,
                module.rank,
                group.rank,
            )?;
        }
        check_length("sum of the modules' ranks", next_rank, group.rank)?;
        check_columns(group)?;
    }
    if let Some(lora) = layout.embedding_lora {
        let sizes = [lora.rank, lora.num_tokens, lora.width];
        check_product("LoRA on the embedding", &sizes)?;
        let (a, b) = (lora.a_panels(dtype).nbytes(), lora.b_panels(dtype).nbytes());
        check_block("end of the embedding's A", lora.a_offset, &[a], limit)?;
        check_block("end of the embedding's B", lora.b_offset, &[b], limit)?;
    }
    for norm in &layout.norms {
        let sizes = [norm.width, dtype.size()];
        check_block("end of a norm", norm.offset, &sizes, limit)?;
    }
    for rows in [layout.embedding, layout.head].into_iter().flatten() {
        let sizes = [rows.count, size_of::<i32>()];
        check_block("end of tokens", rows.tokens_offset, &sizes, limit)?;
        let sizes = [rows.count, rows.width, dtype.size()];
        check_block("end of rows", rows.panels_offset, &sizes, limit)?;
        let sizes = [rows.panels(dtype).nbytes()];
        check_block("end of rows", rows.panels_offset, &sizes, limit)?;
    }
    check_length(
        "layout's groups modulo 4",
        layout.groups.len() % NUM_GROUPS,
        0,
    )
}

/// Checks that a block of `sizes` multiplied is not empty, is aligned, and ends inside the extent.
fn check_block(
    what: &'static str,
    offset: usize,
    sizes: &[usize],
    limit: usize,
) -> Result<(), KernelError> {
    let nbytes = check_product(what, sizes)?;
    if nbytes == 0 || !offset.is_multiple_of(BLOCK_ALIGN) {
        let message = format!(
            "block of {nbytes} bytes at {offset} is empty or not {BLOCK_ALIGN}-byte aligned"
        );
        return Err(KernelError::Invalid(message));
    }
    check_end(what, offset, nbytes, limit)?;
    Ok(())
}

/// Checks that the modules' columns are disjoint: tasks of different modules run at once.
fn check_columns(group: &GroupLayout) -> Result<(), KernelError> {
    let mut modules: Vec<_> = group.modules.iter().collect();
    modules.sort_by_key(|module| module.out_offset);
    let mut end = 0;
    for module in modules {
        let (start, len) = (module.out_offset, module.out_features);
        if start < end {
            let message =
                format!("modules overlap: one ends at column {end}, one starts at {start}");
            return Err(KernelError::Invalid(message));
        }
        end = check_end("end of the module's columns", start, len, usize::MAX)?;
    }
    Ok(())
}
