//! The model whose shapes are measured: its kernels over a pool of their own, weights, and steps.

use loraserve_adapters::{BaseShape, ModuleShape, StorageDtype};
use loraserve_kernels::cpu::context::CpuContext;
use loraserve_kernels::cpu::element::Bf16;
use loraserve_kernels::cpu::linear::PackedLinear;
use loraserve_kernels::cpu::memory::{AlignedBytes, PageMemory};
use loraserve_kernels::cpu::step::{CpuStep, StepArrays};
use loraserve_kernels::geometry::{BLOCK_SIZE, KvGeometry};
use loraserve_kernels::quantized::{QuantFormat, QuantizedWeight};

pub const NUM_LAYERS: usize = 30;
pub const HIDDEN: usize = 576;
pub const INTERMEDIATE: usize = 1536;
pub const VOCAB: usize = 49_152;
pub const GEOMETRY: KvGeometry = KvGeometry {
    num_layers: NUM_LAYERS,
    num_heads: 9,
    num_kv_heads: 3,
    head_dim: 64,
};
const DTYPE: StorageDtype = StorageDtype::BFloat16;

/// A fused projection: its name, its `LoRA` group, and its shape.
#[derive(Clone, Copy)]
pub struct Projection {
    pub name: &'static str,
    pub group: usize,
    pub in_features: usize,
    pub out_features: usize,
}

const fn projection(
    name: &'static str,
    group: usize,
    in_features: usize,
    out_features: usize,
) -> Projection {
    Projection {
        name,
        group,
        in_features,
        out_features,
    }
}

/// The linears of a layer, in the order they run.
pub const PROJECTIONS: [Projection; 4] = [
    projection("qkv", 0, HIDDEN, 960),
    projection("o", 1, HIDDEN, HIDDEN),
    projection("gate_up", 2, HIDDEN, 2 * INTERMEDIATE),
    projection("down", 3, INTERMEDIATE, HIDDEN),
];

impl Projection {
    pub fn num_weights(&self) -> usize {
        self.in_features * self.out_features
    }

    /// The weights packed `count` times over, in memory of their own each.
    pub fn pack(&self, model: &Model, count: usize) -> Vec<PackedLinear> {
        let weight = random(self.num_weights());
        let pack = |_| {
            let CpuContext { pool, arena, .. } = &model.context;
            let (in_features, out_features) = (self.in_features, self.out_features);
            PackedLinear::pack(pool, arena, &weight, None, in_features, out_features)
                .expect("the weight has its length")
        };
        (0..count).map(pack).collect()
    }

    /// As `pack`, of quantised weights; what they are doesn't matter.
    pub fn pack_quantized(
        &self,
        model: &Model,
        count: usize,
        format: QuantFormat,
    ) -> Vec<PackedLinear> {
        let (in_features, out_features) = (self.in_features, self.out_features);
        let num_groups = self.num_weights() / format.group;
        let quants = (0..self.num_weights()).map(|i| (i * 7919 % 16) as u8);
        let mins = vec![-0.01; if format.has_mins { num_groups } else { 0 }];
        let (quants, scales) = (quants.collect(), vec![0.001; num_groups]);
        let weight = QuantizedWeight::new(format, in_features, out_features, quants, scales, mins);
        let weight = weight.expect("the weight has its lengths");
        let pack = |_| {
            let CpuContext { pool, arena, .. } = &model.context;
            PackedLinear::pack_quantized(pool, arena, &[&weight], None).expect("one part packs")
        };
        (0..count).map(pack).collect()
    }
}

pub fn base_shape() -> BaseShape {
    let modules = [
        ("self_attn.q_proj", 0, HIDDEN, HIDDEN, 0),
        ("self_attn.k_proj", 0, HIDDEN, 192, HIDDEN),
        ("self_attn.v_proj", 0, HIDDEN, 192, HIDDEN + 192),
        ("self_attn.o_proj", 1, HIDDEN, HIDDEN, 0),
        ("mlp.gate_proj", 2, HIDDEN, INTERMEDIATE, 0),
        ("mlp.up_proj", 2, HIDDEN, INTERMEDIATE, INTERMEDIATE),
        ("mlp.down_proj", 3, INTERMEDIATE, HIDDEN, 0),
    ];
    let shapes = modules.map(|(path, group, in_features, out_features, out_offset)| {
        let shape = ModuleShape {
            group,
            in_features,
            out_features,
            out_offset,
            has_bias: false,
        };
        (path.to_owned(), shape)
    });
    BaseShape::new(NUM_LAYERS, shapes).expect("the shape is a model's")
}

/// The kernels, and the pool of `num_pages` they work in, filled with small numbers.
pub struct Model {
    pub context: CpuContext,
    pool: AlignedBytes,
}

impl Model {
    pub fn new(num_pages: usize) -> Self {
        let page_nbytes = GEOMETRY.page_nbytes(DTYPE);
        let mut pool = AlignedBytes::zeroed(num_pages * page_nbytes);
        let values = random(page_nbytes / 2);
        for page in 0..num_pages {
            let page = pool.as_mut_ptr::<Bf16>().wrapping_add(page * values.len());
            // SAFETY: the pool holds `num_pages` pages of this length.
            unsafe { page.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        }
        let (base, nbytes) = (pool.as_mut_ptr::<u8>() as usize, pool.nbytes());
        // SAFETY: the pool lives as long as the context beside it, and is used through it alone.
        let memory = unsafe { PageMemory::new(base, nbytes, page_nbytes) };
        let memory = memory.expect("the pool is aligned");
        Self {
            context: CpuContext::new(None, None, DTYPE, GEOMETRY, memory)
                .expect("the shape is a model's"),
            pool,
        }
    }

    pub fn page_nbytes() -> usize {
        GEOMETRY.page_nbytes(DTYPE)
    }

    /// The pages `first..first + count`.
    pub fn pages_mut(&mut self, first: usize, count: usize) -> &mut [u8] {
        let page_nbytes = Self::page_nbytes();
        assert!((first + count) * page_nbytes <= self.pool.nbytes());
        let start = self
            .pool
            .as_mut_ptr::<u8>()
            .wrapping_add(first * page_nbytes);
        // SAFETY: the range lies in the pool, and no kernel runs while `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(start, count * page_nbytes) }
    }

    /// A step of sequences, each (queries, context in tokens), in pages from 0 on; every last query is sampled.
    pub fn step(&self, sequences: &[(usize, usize)], segments: &[Segment]) -> CpuStep {
        let mut arrays = StepArrays {
            query_indptr: vec![0],
            block_table_indptr: vec![0],
            wave_indptr: vec![0, segments.len() as i32],
            ..StepArrays::default()
        };
        let mut first_page = 0;
        for &(num_queries, context) in sequences {
            for position in context - num_queries..context {
                arrays.token_ids.push((position * 7919 % VOCAB) as i32);
                arrays.positions.push(position as i32);
                arrays
                    .slot_mapping
                    .push((first_page * BLOCK_SIZE + position) as i32);
            }
            let num_pages = context.div_ceil(BLOCK_SIZE);
            arrays
                .block_table
                .extend((first_page..first_page + num_pages).map(|page| page as i32));
            first_page += num_pages;
            let num_tokens = arrays.token_ids.len() as i32;
            arrays.query_indptr.push(num_tokens);
            arrays.logits_indices.push(num_tokens - 1);
            arrays.context_lens.push(context as i32);
            arrays
                .block_table_indptr
                .push(arrays.block_table.len() as i32);
        }
        for segment in segments {
            arrays.seg_start.push(segment.start as i32);
            arrays.seg_end.push(segment.end as i32);
            arrays.seg_slot.push(segment.slot as i32);
            arrays.seg_weight.push(1.0);
        }
        self.context.begin_step(arrays).expect("the step is whole")
    }

    /// `num_tokens` sequences of one token each, without adapters.
    pub fn tokens(&self, num_tokens: usize) -> CpuStep {
        self.step(&vec![(1, 1); num_tokens], &[])
    }
}

/// Tokens `start..end` and the slot of their adapter.
pub struct Segment {
    pub start: usize,
    pub end: usize,
    pub slot: usize,
}

/// `len` numbers of either sign below 1/16.
pub fn random(len: usize) -> Vec<Bf16> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let value = ((state >> 40) as f32 / (1 << 24) as f32 - 0.5) / 8.0;
        Bf16((value.to_bits() >> 16) as u16)
    };
    std::iter::repeat_with(next).take(len).collect()
}
