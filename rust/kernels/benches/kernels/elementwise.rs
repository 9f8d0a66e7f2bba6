//! Norm, rotary with KV write, SiLU·mul and embedding: a decode step's rows and a prefill step's.
//!
//! Few rows stay in the cache, so their share of what memory delivers may exceed 100%.

use std::cell::OnceCell;

use loraserve_kernels::cpu::activation::silu_mul;
use loraserve_kernels::cpu::element::Bf16;
use loraserve_kernels::cpu::linear::PackedLinear;
use loraserve_kernels::cpu::norm::rms_norm;
use loraserve_kernels::cpu::rope::HeadTransform;

use crate::bench::{Bench, Work};
use crate::model::{GEOMETRY, HIDDEN, INTERMEDIATE, Model, NUM_LAYERS, Projection, VOCAB, random};

const NUM_ROWS: [usize; 2] = [32, 2048];
const EPS: f32 = 1e-5;

pub fn bench(bench: &mut Bench) {
    let model = OnceCell::new();
    let model = || model.get_or_init(|| Model::new(2048));
    let table = OnceCell::new();
    for rows in NUM_ROWS {
        bench_norm(bench, rows, &model);
        bench_rope(bench, rows, &model);
        bench_silu(bench, rows, &model);
        bench_embedding(bench, rows, &model, &table);
    }
}

/// Elements of bfloat16 moved per row.
fn moves(rows: usize, elements: usize) -> Work {
    Work {
        nbytes: 2 * rows * elements,
        flop: 0,
    }
}

fn bench_norm<'a>(bench: &mut Bench, rows: usize, model: &impl Fn() -> &'a Model) {
    let setup = || {
        let row = || random(rows * HIDDEN);
        (row(), row(), random(HIDDEN), row())
    };
    // Reads x and the residual, writes the residual and the result.
    let work = moves(rows, 4 * HIDDEN);
    bench.measure(
        &format!("norm/add/{rows}"),
        work,
        setup,
        |(x, residual, weight, out), _| {
            let context = &model().context;
            let result = rms_norm(
                &context.pool,
                context.isa,
                x,
                Some(residual),
                weight,
                EPS,
                out,
            );
            result.expect("shapes agree");
        },
    );
}

fn bench_rope<'a>(bench: &mut Bench, rows: usize, model: &impl Fn() -> &'a Model) {
    let setup = || {
        let cos_sin = vec![0.5_f32; rows * GEOMETRY.head_dim];
        (
            model().step(&[(rows, rows)], &[]),
            random(rows * GEOMETRY.qkv_features()),
            cos_sin,
        )
    };
    // Reads the row, writes q and k back and k and v to their page.
    let kv = GEOMETRY.num_kv_heads * GEOMETRY.head_dim;
    let work = moves(rows, 2 * GEOMETRY.qkv_features() + kv);
    bench.measure(
        &format!("rope and cache/{rows}"),
        work,
        setup,
        |(step, qkv, cos_sin), call| {
            let transform = HeadTransform {
                cos_sin,
                q_norm: None,
                k_norm: None,
                eps: EPS,
            };
            let result = model()
                .context
                .rope_and_cache(step, call % NUM_LAYERS, transform, qkv);
            result.expect("shapes agree");
        },
    );
}

fn bench_silu<'a>(bench: &mut Bench, rows: usize, model: &impl Fn() -> &'a Model) {
    let setup = || {
        let out = vec![Bf16::default(); rows * INTERMEDIATE];
        (random(rows * 2 * INTERMEDIATE), out)
    };
    let work = moves(rows, 3 * INTERMEDIATE);
    bench.measure(
        &format!("silu_mul/{rows}"),
        work,
        setup,
        |(gate_up, out), _| {
            let context = &model().context;
            let result = silu_mul(&context.pool, context.isa, gate_up, INTERMEDIATE, out);
            result.expect("shapes agree");
        },
    );
}

fn bench_embedding<'a>(
    bench: &mut Bench,
    rows: usize,
    model: &impl Fn() -> &'a Model,
    table: &OnceCell<PackedLinear>,
) {
    let setup = || {
        let shape = Projection {
            name: "embedding",
            group: 0,
            in_features: HIDDEN,
            out_features: VOCAB,
        };
        let table = table.get_or_init(|| shape.pack(model(), 1).remove(0));
        let step = model().step(&[(rows, rows)], &[]);
        (step, table, vec![Bf16::default(); rows * HIDDEN])
    };
    let work = moves(rows, 2 * HIDDEN);
    bench.measure(
        &format!("embedding/{rows}"),
        work,
        setup,
        |(step, table, out), _| {
            let result = model().context.embedding::<Bf16, Bf16>(step, table, out);
            result.expect("shapes agree");
        },
    );
}
