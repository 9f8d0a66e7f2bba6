//! Paged attention of one layer; calls go through the layers, so that K and V come from memory as in a step.

use std::cell::OnceCell;

use loraserve_kernels::cpu::element::Bf16;

use crate::bench::{Bench, Work};
use crate::model::{GEOMETRY, Model, NUM_LAYERS, random};

/// Name, number of sequences, and each one's queries and context in tokens.
const CASES: [(&str, usize, usize, usize); 6] = [
    ("decode 32x160", 32, 1, 160),
    ("decode 8x4096", 8, 1, 4096),
    ("decode 1x4096", 1, 1, 4096),
    ("prefill 11x128", 11, 128, 128),
    ("prefill 1x4096", 1, 4096, 4096),
    ("prefill 2048 after 2048", 1, 2048, 4096),
];
/// Pages of the longest contexts, of 16 tokens each.
const NUM_PAGES: usize = 8 * 4096 / 16;

pub fn bench(bench: &mut Bench) {
    let model = OnceCell::new();
    let model = || model.get_or_init(|| Model::new(NUM_PAGES));
    for (name, num_seqs, queries, context) in CASES {
        let num_tokens = num_seqs * queries;
        let setup = || {
            let step = model().step(&vec![(queries, context); num_seqs], &[]);
            let out = vec![Bf16::default(); num_tokens * GEOMETRY.num_heads * GEOMETRY.head_dim];
            (step, random(num_tokens * GEOMETRY.qkv_features()), out)
        };
        let work = work(num_seqs, queries, context);
        bench.measure(
            &format!("attention/{name}"),
            work,
            setup,
            |(step, qkv, out), call| {
                let result = model().context.attention(step, call % NUM_LAYERS, qkv, out);
                result.expect("shapes agree");
            },
        );
    }
}

/// K and V read once, queries read and outputs written; each query meets the tokens up to its own.
fn work(num_seqs: usize, queries: usize, context: usize) -> Work {
    let kv_row = 2 * GEOMETRY.num_kv_heads * GEOMETRY.head_dim;
    let q_row = GEOMETRY.num_heads * GEOMETRY.head_dim;
    let num_pairs: usize = (context - queries + 1..=context).sum();
    Work {
        nbytes: num_seqs * 2 * (context * kv_row + queries * 2 * q_row),
        flop: num_seqs * num_pairs * 4 * q_row,
    }
}
