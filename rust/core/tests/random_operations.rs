//! Random operations over small pools and many configurations, every invariant checked after each.

mod support;

use support::harness::Harness;

const NUM_SEEDS: u64 = 1000;
const NUM_OPERATIONS: usize = 1000;

#[test]
fn random_operations_keep_every_invariant_and_every_request_ends_once() {
    let (mut num_operations, mut num_finished) = (0, 0);
    let mut totals = [0; 8];
    for seed in 0..NUM_SEEDS {
        let mut harness = Harness::new(seed);
        for _ in 0..NUM_OPERATIONS {
            harness.operate();
        }
        harness.drain();
        let stats = harness.scheduler.stats();
        let seen = [
            stats.num_adapter_loads,
            stats.num_adapter_evictions,
            stats.num_preemptions,
            stats.num_prefix_hit_tokens,
            harness.num_moves,
            harness.num_pins,
            harness.num_replacements,
            harness.num_pins_passed_on,
        ];
        totals
            .iter_mut()
            .zip(seen)
            .for_each(|(total, seen)| *total += seen);
        harness.check_nothing_leaked();
        num_operations += harness.num_operations;
        num_finished += harness.num_finished;
    }
    println!("{num_operations} operations, {num_finished} requests, {totals:?}");
    assert!(num_operations >= 100_000);
    assert!(num_finished >= 10_000);
    assert!(
        totals.iter().all(|&total| total >= 100),
        "everything is exercised: {totals:?}"
    );
}
