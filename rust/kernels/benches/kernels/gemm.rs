//! The dense product of every projection, and of a whole step's, without adapters.
//!
//! Weights come from memory as in a step: each call takes the next of as many copies as a model's layers weigh.

use std::cell::OnceCell;

use loraserve_kernels::cpu::element::Bf16;
use loraserve_kernels::cpu::gemm::Epilogue;
use loraserve_kernels::cpu::linear::PackedLinear;
use loraserve_kernels::quantized::{QuantBits, QuantFormat};

use crate::bench::{Bench, Work};
use crate::model::{HIDDEN, Model, NUM_LAYERS, PROJECTIONS, Projection, VOCAB, random};

const NUM_ROWS: [usize; 5] = [1, 8, 32, 256, 1365];
/// Rows of logits in a step, one per sequence.
const NUM_LOGITS: [usize; 4] = [1, 8, 32, 256];
/// Those of GGUF's `Q8_0`, `Q4_0` and `Q4_1` or `Q4_K`.
const FORMATS: [QuantFormat; 3] = [
    QuantFormat {
        bits: QuantBits::Eight,
        group: 32,
        has_mins: false,
    },
    QuantFormat {
        bits: QuantBits::Four,
        group: 32,
        has_mins: false,
    },
    QuantFormat {
        bits: QuantBits::Four,
        group: 32,
        has_mins: true,
    },
];
/// Bytes of a model's layers.
const LAYERS_NBYTES: usize = 212 << 20;

pub fn bench(bench: &mut Bench) {
    let model = OnceCell::new();
    let model = || model.get_or_init(|| Model::new(1365));
    for projection in PROJECTIONS {
        bench_projection(bench, projection, &model);
    }
    bench_layers(bench, &model, None);
    for format in FORMATS {
        bench_layers(bench, &model, Some(format));
    }
    bench_lm_head(bench, &model);
}

/// Input, output and packed weights of bfloat16, each touched once.
pub fn dense_work(projection: Projection, num_rows: usize) -> Work {
    let activations = num_rows * (projection.in_features + projection.out_features);
    Work {
        nbytes: 2 * (projection.num_weights() + activations),
        flop: 2 * num_rows * projection.num_weights(),
    }
}

fn bench_projection<'a>(bench: &mut Bench, projection: Projection, model: &impl Fn() -> &'a Model) {
    let count = LAYERS_NBYTES.div_ceil(2 * projection.num_weights());
    let weights = OnceCell::new();
    for rows in NUM_ROWS {
        let setup = || {
            let model = model();
            let weights: &Vec<PackedLinear> = weights.get_or_init(|| projection.pack(model, count));
            let x = random(rows * projection.in_features);
            let out = vec![Bf16::default(); rows * projection.out_features];
            (model.tokens(rows), x, weights, out)
        };
        let name = format!("gemm/{}/{rows}", projection.name);
        bench.measure(
            &name,
            dense_work(projection, rows),
            setup,
            |(step, x, weights, out), call| {
                let weight = &weights[call % count];
                let result =
                    model()
                        .context
                        .lora_linear(step, x, weight, 0, 0, Epilogue::Store, out);
                result.expect("shapes agree");
            },
        );
    }
}

/// All linears of all layers, in the order they run, of bfloat16 or of a format.
fn bench_layers<'a>(
    bench: &mut Bench,
    model: &impl Fn() -> &'a Model,
    format: Option<QuantFormat>,
) {
    let layers = OnceCell::new();
    for rows in NUM_ROWS {
        let setup = || {
            let layers: &Layers = layers.get_or_init(|| Layers::new(model(), format));
            (model().tokens(rows), layers, Buffers::new(rows))
        };
        let name = match format {
            None => format!("gemm/layers/{rows}"),
            Some(format) => format!("gemm/layers-{}/{rows}", name_of(format)),
        };
        let bits = format.map_or(16.0, bits_of);
        bench.measure(
            &name,
            layers_work(rows, bits),
            setup,
            |(step, layers, buffers), _| {
                layers.for_each(|layer, projection, weight| {
                    let (x, out) = buffers.of(rows, projection);
                    let result = model().context.lora_linear(
                        step,
                        x,
                        weight,
                        layer,
                        projection.group,
                        Epilogue::Store,
                        out,
                    );
                    result.expect("shapes agree");
                });
            },
        );
    }
}

fn bench_lm_head<'a>(bench: &mut Bench, model: &impl Fn() -> &'a Model) {
    let lm_head = Projection {
        name: "lm_head",
        group: 0,
        in_features: HIDDEN,
        out_features: VOCAB,
    };
    let count = LAYERS_NBYTES.div_ceil(2 * lm_head.num_weights());
    let weights = OnceCell::new();
    for rows in NUM_LOGITS {
        let setup = || {
            let weights: &Vec<PackedLinear> = weights.get_or_init(|| lm_head.pack(model(), count));
            let gathered = vec![Bf16::default(); rows * HIDDEN];
            (
                model().tokens(rows),
                random(rows * HIDDEN),
                weights,
                gathered,
                vec![0.0; rows * VOCAB],
            )
        };
        let work = Work {
            nbytes: 2 * lm_head.num_weights() + rows * (2 * HIDDEN + 4 * VOCAB),
            flop: 2 * rows * lm_head.num_weights(),
        };
        let name = format!("gemm/lm_head/{rows}");
        bench.measure(
            &name,
            work,
            setup,
            |(step, hidden, weights, gathered, logits), call| {
                let weight = &weights[call % count];
                let (context, sampled) = (&model().context, step.sampled());
                let rows = context.gather(step, sampled, (&*hidden, HIDDEN), gathered);
                rows.expect("shapes agree");
                let result = context.logits(step, sampled, gathered, weight, logits);
                result.expect("shapes agree");
            },
        );
    }
}

fn name_of(format: QuantFormat) -> &'static str {
    match (format.bits, format.has_mins) {
        (QuantBits::Eight, _) => "q8_0",
        (QuantBits::Four, false) => "q4_0",
        (QuantBits::Four, true) => "q4_1",
    }
}

/// Of a weight, its share of scales and minimums counted in.
fn bits_of(format: QuantFormat) -> f64 {
    let bits = match format.bits {
        QuantBits::Eight => 8.0,
        QuantBits::Four => 4.0,
    };
    let per_group = if format.has_mins { 32.0 } else { 16.0 };
    bits + per_group / format.group as f64
}

/// Weights of `bits` each.
pub fn layers_work(num_rows: usize, bits: f64) -> Work {
    let works = PROJECTIONS.map(|projection| {
        let mut work = dense_work(projection, num_rows);
        let num_weights = projection.num_weights() as f64;
        work.nbytes =
            work.nbytes - 2 * projection.num_weights() + (num_weights * bits / 8.0) as usize;
        work
    });
    Work {
        nbytes: NUM_LAYERS * works.iter().map(|work| work.nbytes).sum::<usize>(),
        flop: NUM_LAYERS * works.iter().map(|work| work.flop).sum::<usize>(),
    }
}

/// The linears of all layers, each in memory of its own.
pub struct Layers(Vec<Vec<PackedLinear>>);

impl Layers {
    pub fn new(model: &Model, format: Option<QuantFormat>) -> Self {
        let pack = |projection: &Projection| match format {
            None => projection.pack(model, NUM_LAYERS),
            Some(format) => projection.pack_quantized(model, NUM_LAYERS, format),
        };
        Self(PROJECTIONS.iter().map(pack).collect())
    }

    pub fn weight(&self, layer: usize, projection: Projection) -> &PackedLinear {
        &self.0[projection.group][layer]
    }

    pub fn for_each(&self, mut call: impl FnMut(usize, Projection, &PackedLinear)) {
        for layer in 0..NUM_LAYERS {
            for projection in PROJECTIONS {
                call(layer, projection, self.weight(layer, projection));
            }
        }
    }
}

/// Input and output of every projection of a step.
pub struct Buffers {
    x: Vec<Bf16>,
    out: Vec<Bf16>,
}

impl Buffers {
    pub fn new(num_rows: usize) -> Self {
        let widest =
            |width: fn(&Projection) -> usize| PROJECTIONS.iter().map(width).max().unwrap_or(0);
        Self {
            x: random(num_rows * widest(|p| p.in_features)),
            out: vec![Bf16::default(); num_rows * widest(|p| p.out_features)],
        }
    }

    pub fn of(&mut self, num_rows: usize, projection: Projection) -> (&[Bf16], &mut [Bf16]) {
        let x = &self.x[..num_rows * projection.in_features];
        (x, &mut self.out[..num_rows * projection.out_features])
    }
}
