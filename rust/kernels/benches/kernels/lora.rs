//! Linears with distinct rank-16 adapters beside the same without: a decode step and a prefill step.

use std::cell::OnceCell;

use loraserve_adapters::FactorDtype;
use loraserve_kernels::cpu::gemm::Epilogue;
use loraserve_kernels::cpu::step::CpuStep;

use crate::adapters::{RANK, model_with_adapters};
use crate::bench::{Bench, Work};
use crate::gemm::{Buffers, Layers, dense_work};
use crate::model::{Model, NUM_LAYERS, PROJECTIONS, Projection, Segment, base_shape};

/// Adapters in a step; the first is the step without.
const NUM_DISTINCT: [usize; 4] = [0, 1, 8, 32];
/// Tokens of a step: 32 sequences that decode; a third of the prompts of 32 sequences of 128 tokens.
const STEPS: [(&str, usize); 2] = [("decode", 32), ("prefill", 1365)];
/// Pages for the tokens of a step, each of which may have its own.
const NUM_PAGES: usize = 1365;

struct Setting {
    model: Model,
    layers: Layers,
}

pub fn bench(bench: &mut Bench) {
    bench_kept(bench, "lora", FactorDtype::Storage);
    bench_kept(bench, "lora int8", FactorDtype::Int8);
}

fn bench_kept(bench: &mut Bench, group: &str, factors: FactorDtype) {
    let setting = OnceCell::new();
    let setting = || {
        setting.get_or_init(|| {
            let model = model_with_adapters(NUM_PAGES, 32, factors);
            let layers = Layers::new(&model, None);
            Setting { model, layers }
        })
    };
    for (phase, num_tokens) in STEPS {
        for projection in PROJECTIONS {
            for distinct in NUM_DISTINCT {
                let name = format!(
                    "{group}/{phase} {num_tokens}/{}/{distinct} adapters",
                    projection.name
                );
                let setup = || {
                    (
                        setting(),
                        mixed(&setting().model, num_tokens, distinct),
                        Buffers::new(num_tokens),
                    )
                };
                let work = lora_work(projection, num_tokens, distinct, factors);
                bench.measure(&name, work, setup, |(setting, step, buffers), call| {
                    setting.run(step, buffers, call % NUM_LAYERS, projection);
                });
            }
        }
        for distinct in NUM_DISTINCT {
            let name = format!("{group}/{phase} {num_tokens}/layers/{distinct} adapters");
            let setup = || {
                (
                    setting(),
                    mixed(&setting().model, num_tokens, distinct),
                    Buffers::new(num_tokens),
                )
            };
            let works =
                PROJECTIONS.map(|projection| lora_work(projection, num_tokens, distinct, factors));
            let work = Work {
                nbytes: NUM_LAYERS * works.iter().map(|work| work.nbytes).sum::<usize>(),
                flop: NUM_LAYERS * works.iter().map(|work| work.flop).sum::<usize>(),
            };
            bench.measure(&name, work, setup, |(setting, step, buffers), _| {
                for layer in 0..NUM_LAYERS {
                    for projection in PROJECTIONS {
                        setting.run(step, buffers, layer, projection);
                    }
                }
            });
        }
    }
}

impl Setting {
    fn run(&self, step: &CpuStep, buffers: &mut Buffers, layer: usize, projection: Projection) {
        let (x, out) = buffers.of(step.num_tokens(), projection);
        let weight = self.layers.weight(layer, projection);
        let context = &self.model.context;
        let result = context.lora_linear(
            step,
            x,
            weight,
            layer,
            projection.group,
            Epilogue::Store,
            out,
        );
        result.expect("shapes agree");
    }
}

/// A step whose tokens are shared out evenly among the first `distinct` adapters.
fn mixed(model: &Model, num_tokens: usize, distinct: usize) -> CpuStep {
    let segments: Vec<_> = (0..distinct)
        .map(|slot| Segment {
            start: num_tokens * slot / distinct,
            end: num_tokens * (slot + 1) / distinct,
            slot,
        })
        .collect();
    model.step(&vec![(1, 1); num_tokens], &segments)
}

/// The dense product, and each adapter's A and B read once and applied to its tokens.
fn lora_work(
    projection: Projection,
    num_tokens: usize,
    distinct: usize,
    factors: FactorDtype,
) -> Work {
    let shape = base_shape();
    let modules = shape.group(projection.group).into_iter();
    let num_weights: usize = modules
        .map(|(_, m)| RANK * (m.in_features + m.out_features))
        .sum();
    let dense = dense_work(projection, num_tokens);
    let weight_nbytes = match factors {
        FactorDtype::Storage => 2,
        FactorDtype::Int8 => 1,
    };
    let num_adapted = if distinct == 0 { 0 } else { num_tokens };
    Work {
        nbytes: dense.nbytes + weight_nbytes * distinct * num_weights,
        flop: dense.flop + 2 * num_adapted * num_weights,
    }
}
