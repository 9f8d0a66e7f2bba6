//! `schedule` + `commit`, batch building included, with 256 running sequences.
//!
//! ```text
//! decode   every sequence decodes
//! mixed    a sequence ends each step, and one is admitted whose prompt is prefilled; all adapters are resident
//! churn    as mixed, with any of the registered adapters: loads and evictions in a full pool
//! ```
//! The bar is 100 µs a step, whatever the number of registered adapters.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use loraserve_core::{
    AdapterContent, Batch, FinishReason, NewRequest, RequestId, Scheduler, SchedulerConfig,
};

const NUM_RUNNING: usize = 256;
const NUM_REGISTERED: [usize; 3] = [100, 1_000, 10_000];
/// Adapters that are asked for in `decode` and `mixed`: as many as are registered in the smallest case.
const NUM_POPULAR: usize = 100;
/// 5.6 GiB of pages of `SmolLM2` in bfloat16, and a rank-8 adapter of it.
const NUM_PAGES: usize = 16 << 10;
const PAGE_NBYTES: usize = 360 << 10;
const ADAPTER_NBYTES: usize = 4_900_000;
const PROMPT_LEN: usize = 128;
const NUM_NEW_TOKENS: usize = 256;

#[derive(Clone, Copy)]
enum Work {
    Decode,
    Mixed,
    Churn,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Mixed => "mixed",
            Self::Churn => "churn",
        }
    }
}

struct Server {
    scheduler: Scheduler,
    num_asked_for: usize,
    /// Of the last start, to be aborted at the next.
    requests: Vec<RequestId>,
    random: u64,
}

impl Server {
    fn new(num_registered: usize, work: Work) -> Self {
        let config = SchedulerConfig {
            num_pages: NUM_PAGES,
            page_nbytes: PAGE_NBYTES,
            max_num_seqs: NUM_RUNNING,
            ..SchedulerConfig::default()
        };
        let mut scheduler = Scheduler::new(config).expect("settings are in range");
        for index in 0..num_registered {
            let (name, hash) = (format!("adapter-{index}"), format!("hash-{index}"));
            scheduler
                .register_adapter(&name, AdapterContent::new(&hash, ADAPTER_NBYTES))
                .expect("names are distinct");
        }
        let num_asked_for = match work {
            Work::Decode | Work::Mixed => NUM_POPULAR.min(num_registered),
            Work::Churn => num_registered,
        };
        let mut server = Self {
            scheduler,
            num_asked_for,
            requests: Vec::new(),
            random: 0x9e37_79b9_7f4a_7c15,
        };
        server.start(work);
        server
    }

    /// Ends what runs and brings 256 sequences to where they all decode.
    fn start(&mut self, work: Work) {
        for request in std::mem::take(&mut self.requests) {
            self.scheduler.finish(request, FinishReason::Abort);
        }
        for index in 0..NUM_RUNNING {
            let max_tokens = match work {
                Work::Decode => usize::MAX,
                // One ends each step from then on.
                Work::Mixed | Work::Churn => NUM_NEW_TOKENS + index,
            };
            self.submit(max_tokens);
        }
        let is_decode =
            |batch: Batch| batch.num_seqs() == NUM_RUNNING && batch.num_prefill_tokens == 0;
        while !self.step().0.is_some_and(is_decode) {}
    }

    /// Starts a request for each that has ended.
    fn refill(&mut self) {
        let stats = self.scheduler.stats();
        for _ in stats.num_running + stats.num_waiting..NUM_RUNNING {
            self.submit(NUM_NEW_TOKENS);
        }
    }

    fn submit(&mut self, max_tokens: usize) {
        let adapter = self.next_random() as usize % self.num_asked_for;
        let prompt = (0..PROMPT_LEN).map(|_| (self.next_random() % 49_152) as i32);
        let request = NewRequest {
            prompt: prompt.collect(),
            adapters: vec![(format!("adapter-{adapter}"), 1.0)],
            max_tokens: Some(max_tokens),
            ..NewRequest::default()
        };
        let request = self.scheduler.submit(request).expect("the request fits");
        self.requests.push(request);
    }

    /// Plans and commits a step; returns its batch, and the time that took.
    fn step(&mut self) -> (Option<Batch>, Duration) {
        let start = Instant::now();
        let step = self.scheduler.schedule();
        let planning = start.elapsed();
        let num_samples = step.batch.as_ref().map_or(0, |b| b.logits_indices.len());
        let token_ids: Vec<_> = (0..num_samples)
            .map(|_| (self.next_random() % 49_152) as i32)
            .collect();
        let start = Instant::now();
        self.scheduler.commit(step.id, &token_ids);
        let elapsed = planning + start.elapsed();
        for load in &step.loads {
            self.scheduler
                .adapter_loaded(load.adapter)
                .expect("the adapter is loading");
        }
        self.scheduler.drain_outputs();
        (step.batch, elapsed)
    }

    /// xorshift64*
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }
}

/// Time of `num_steps` steps; what happens between steps is not timed.
fn time_steps(server: &mut Server, work: Work, num_steps: u64) -> Duration {
    let mut elapsed = Duration::ZERO;
    for step in 0..num_steps {
        match work {
            // Sequences grow: as many steps as an answer has tokens, then from the start.
            Work::Decode if step % NUM_NEW_TOKENS as u64 == 0 => server.start(work),
            Work::Decode => {}
            Work::Mixed | Work::Churn => server.refill(),
        }
        elapsed += server.step().1;
    }
    elapsed
}

fn scheduler(criterion: &mut Criterion) {
    for work in [Work::Decode, Work::Mixed, Work::Churn] {
        let mut group = criterion.benchmark_group(format!("step of 256, {}", work.name()));
        for num_registered in NUM_REGISTERED {
            let id = BenchmarkId::from_parameter(format!("{num_registered} registered"));
            group.bench_function(id, |bencher| {
                let mut server = Server::new(num_registered, work);
                bencher.iter_custom(|num_steps| time_steps(&mut server, work, num_steps));
                server.scheduler.check_invariants();
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = scheduler
}
criterion_main!(benches);
