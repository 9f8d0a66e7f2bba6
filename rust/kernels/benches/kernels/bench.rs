//! Times calls with criterion, and reports them beside the machine's limits, as a table and as JSON lines.

use std::fs::OpenOptions;
use std::io::Write;
use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode};

use crate::limits::Limits;

/// Names the file that results are appended to, a JSON object a line.
pub const JSON_VARIABLE: &str = "LORASERVE_BENCH_JSON";

/// What a call must move and compute at least.
#[derive(Clone, Copy, Default)]
pub struct Work {
    pub nbytes: usize,
    pub flop: usize,
}

struct Measured {
    name: String,
    work: Work,
    seconds: f64,
}

pub struct Bench {
    criterion: Criterion,
    limits: Limits,
    results: Vec<Measured>,
}

impl Bench {
    pub fn new(limits: Limits) -> Self {
        let criterion = Criterion::default()
            .sample_size(10)
            .warm_up_time(Duration::from_millis(100))
            .measurement_time(Duration::from_millis(400))
            .configure_from_args();
        Self {
            criterion,
            limits,
            results: Vec::new(),
        }
    }

    /// Times `call`, which gets its number from 0 on; `setup` runs only if the name is chosen.
    pub fn measure<T>(
        &mut self,
        name: &str,
        work: Work,
        setup: impl Fn() -> T,
        call: impl Fn(&mut T, usize),
    ) {
        let mut samples = Vec::new();
        let (family, case) = name.split_once('/').expect("a name is family/case");
        let mut group = self.criterion.benchmark_group(family);
        group.sampling_mode(SamplingMode::Flat);
        group.bench_function(case, |bencher| {
            let mut state = setup();
            let mut num_calls = 0;
            bencher.iter_custom(|iters| {
                let start = Instant::now();
                for _ in 0..iters {
                    call(&mut state, num_calls);
                    num_calls += 1;
                }
                let elapsed = start.elapsed();
                samples.push(elapsed.as_secs_f64() / iters as f64);
                elapsed
            });
        });
        group.finish();
        if samples.is_empty() {
            return;
        }
        samples.sort_by(f64::total_cmp);
        self.results.push(Measured {
            name: name.to_owned(),
            work,
            seconds: samples[samples.len() / 2],
        });
    }

    pub fn finish(&self) {
        println!("\n{}", self.limits);
        let width = self.results.iter().map(|r| r.name.len()).max().unwrap_or(0);
        for result in &self.results {
            println!("{:width$}  {}", result.name, self.describe(result));
        }
        if let Ok(path) = std::env::var(JSON_VARIABLE) {
            self.append_json(&path)
                .expect("the file for results can be written");
        }
    }

    fn describe(&self, result: &Measured) -> String {
        let (gb_per_s, gflop_per_s) = result.rates();
        let of_read = 100.0 * gb_per_s / self.limits.read_gb_per_s;
        let of_gemm = 100.0 * gflop_per_s / self.limits.gemm_gflop_per_s;
        let time = result.seconds * 1e6;
        format!(
            "{time:10.1} us  {gb_per_s:6.1} GB/s ({of_read:3.0}%)  {gflop_per_s:7.1} GFLOP/s ({of_gemm:3.0}%)"
        )
    }

    fn append_json(&self, path: &str) -> std::io::Result<()> {
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        writeln!(file, "{}", self.limits.to_json())?;
        for result in &self.results {
            let (gb_per_s, gflop_per_s) = result.rates();
            writeln!(
                file,
                r#"{{"kernel": "{}", "seconds": {:e}, "gb_per_s": {gb_per_s:.3}, "gflop_per_s": {gflop_per_s:.3}}}"#,
                result.name, result.seconds
            )?;
        }
        Ok(())
    }
}

impl Measured {
    /// GB/s and GFLOP/s.
    fn rates(&self) -> (f64, f64) {
        let per_ns = |count: usize| count as f64 / self.seconds / 1e9;
        (per_ns(self.work.nbytes), per_ns(self.work.flop))
    }
}
