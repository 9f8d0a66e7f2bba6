//! The scheduler driven by hand, without a device.

mod adapters;
mod ahead;
mod batches;
mod drafts;
mod flows;
mod late_loads;
mod memory;
mod prefill_room;
mod prefixes;

use super::*;
use crate::adapter_cache::AdapterContent;
use crate::ids::CacheScope;
use crate::request::{FinishReason, Flow, FlowWeight, NewRequest};

fn scheduler(change: impl FnOnce(&mut SchedulerConfig)) -> Scheduler {
    let mut config = SchedulerConfig {
        num_pages: 16,
        page_nbytes: 100,
        block_size: 4,
        max_num_seqs: 8,
        max_batched_tokens: 64,
        max_model_len: 64,
        ..SchedulerConfig::default()
    };
    change(&mut config);
    Scheduler::new(config).unwrap()
}

fn request(prompt: &[i32], adapters: &[(&str, f32)], max_tokens: usize) -> NewRequest {
    NewRequest {
        prompt: prompt.to_vec(),
        adapters: adapters
            .iter()
            .map(|&(name, weight)| (name.to_owned(), weight))
            .collect(),
        max_tokens: Some(max_tokens),
        ..NewRequest::default()
    }
}

/// Commits 0 for every row sampled.
fn commit(scheduler: &mut Scheduler, step: &SchedulerOutput) {
    let num_samples = step
        .batch
        .as_ref()
        .map_or(0, |batch| batch.logits_indices.len());
    scheduler.commit(step.id, &vec![0; num_samples]);
    scheduler.check_invariants();
}

/// Steps once, answering loads at once; returns the batch.
fn step(scheduler: &mut Scheduler) -> Option<Batch> {
    let step = scheduler.schedule();
    scheduler.check_invariants();
    finish_step(scheduler, &step);
    step.batch
}

fn finish_step(scheduler: &mut Scheduler, step: &SchedulerOutput) {
    commit(scheduler, step);
    for load in &step.loads {
        scheduler.adapter_loaded(load.adapter).unwrap();
    }
}

/// Prompt tokens found in the prefix cache, of each request admitted until the queue is empty.
fn num_cached(scheduler: &mut Scheduler) -> Vec<usize> {
    let mut all = Vec::new();
    while scheduler.has_work() {
        let planned = scheduler.schedule();
        all.extend(planned.admitted.iter().map(|a| a.num_cached_tokens));
        finish_step(scheduler, &planned);
    }
    all
}

fn drain(scheduler: &mut Scheduler) {
    for _ in 0..1000 {
        if !scheduler.has_work() {
            return;
        }
        step(scheduler);
    }
    panic!("the queue drains: {:?}", scheduler.stats());
}

/// Tokens of all answers until the queue is empty.
fn num_generated(scheduler: &mut Scheduler) -> usize {
    drain(scheduler);
    let outputs = scheduler.drain_outputs().into_iter();
    outputs.filter(|output| output.token.is_some()).count()
}

fn finishes(scheduler: &mut Scheduler) -> Vec<(u64, FinishReason)> {
    let outputs = scheduler.drain_outputs().into_iter();
    outputs
        .filter_map(|output| Some((output.request.0, output.finish?)))
        .collect()
}

fn state_of(scheduler: &Scheduler, name: &str) -> &'static str {
    let listed = scheduler.adapters();
    listed.iter().find(|info| info.name == name).unwrap().state
}
