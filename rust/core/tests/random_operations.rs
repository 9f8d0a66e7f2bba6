//! Random operations over small pools and many configurations, every invariant checked after each.
//!
//! A seed stands for a configuration, weights of the operations and the operations themselves. `LORASERVE_SEED` runs one
//! alone; `LORASERVE_OPERATIONS` says how many operations are run, from `LORASERVE_FIRST_SEED` on.

mod support;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use support::harness::Harness;
use support::trace::Trace;

const NUM_OPERATIONS: u64 = 1_000_000;
/// Of a seed, before it drains.
const OPERATIONS_PER_SEED: u64 = 1000;
const PROGRESS_EVERY: Duration = Duration::from_secs(30);

/// What must happen at least this often in as many operations as are run without being asked for more.
const AT_LEAST: u64 = 100;
const SEEN: [&str; 25] = [
    "accepted to the last page",
    "adapters evicted",
    "adapters loaded",
    "adapters that act from within a prompt",
    "answered late",
    "ended beside stuck loads",
    "ended between schedule and commit",
    "finished",
    "flows beside others",
    "guesses that came true",
    "guesses that did not",
    "moves",
    "not planned ahead",
    "pinned",
    "pins passed on",
    "planned ahead",
    "pooled",
    "preempted",
    "prefix hits",
    "refused for one page",
    "replaced under load",
    "rows of prompts",
    "samples discarded",
    "sums of weights too large",
    "weights of zero beside others",
];

type Counts = BTreeMap<&'static str, u64>;

#[test]
fn random_operations_keep_every_invariant_and_every_request_ends_once() {
    if let Some(seed) = number("LORASERVE_SEED") {
        println!("{:?}", run_twice(seed));
        return;
    }
    let num_operations = number("LORASERVE_OPERATIONS").unwrap_or(NUM_OPERATIONS);
    let first_seed = number("LORASERVE_FIRST_SEED").unwrap_or(0);
    let counts = run_seeds(first_seed, num_operations);
    println!("{counts:?}");
    if num_operations >= NUM_OPERATIONS {
        for what in SEEN {
            let count = counts.get(what).copied().unwrap_or(0);
            assert!(count >= AT_LEAST, "{what}: {count} of {AT_LEAST} or more");
        }
    }
}

/// Runs seeds on every core until as many operations are done, and adds up what was seen.
fn run_seeds(first_seed: u64, num_operations: u64) -> Counts {
    let (next, done) = (AtomicU64::new(first_seed), AtomicU64::new(0));
    let has_failed = AtomicBool::new(false);
    let totals = Mutex::new((Counts::new(), Instant::now()));
    let work = || {
        while done.load(Ordering::Relaxed) < num_operations && !has_failed.load(Ordering::Relaxed) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let counts = catch_unwind(AssertUnwindSafe(|| run_twice(seed))).unwrap_or_else(|e| {
                has_failed.store(true, Ordering::Relaxed);
                eprintln!("{}", how_to_repeat(seed));
                resume_unwind(e)
            });
            let done = done.fetch_add(counts["operations"], Ordering::Relaxed);
            let mut totals = totals.lock().unwrap_or_else(PoisonError::into_inner);
            for (what, count) in counts {
                *totals.0.entry(what).or_default() += count;
            }
            if totals.1.elapsed() > PROGRESS_EVERY {
                println!("{done} of {num_operations} operations, seed {seed}, no fault");
                totals.1 = Instant::now();
            }
        }
    };
    let num_threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| (0..num_threads).for_each(|_| drop(scope.spawn(work))));
    totals
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner)
        .0
}

/// The same twice: what a scheduler does depends on what it is told alone.
fn run_twice(seed: u64) -> Counts {
    let (counts, trace) = run(seed, true);
    let (_, again) = run(seed, false);
    assert_eq!(trace, again, "the same seed does the same");
    counts
}

fn run(seed: u64, checks_invariants: bool) -> (Counts, Trace) {
    let mut harness = Harness::new(seed, checks_invariants);
    while harness.num_operations < OPERATIONS_PER_SEED {
        harness.operate();
    }
    harness.drain();
    harness.check_nothing_leaked();
    let stats = harness.scheduler.stats();
    let mut counts = std::mem::take(&mut harness.counts);
    counts.extend([
        ("operations", harness.num_operations),
        ("adapters loaded", stats.num_adapter_loads),
        ("adapters evicted", stats.num_adapter_evictions),
        ("preempted", stats.num_preemptions),
        ("prefix hits", stats.num_prefix_hit_tokens),
    ]);
    (counts, harness.trace())
}

fn number(variable: &str) -> Option<u64> {
    let value = std::env::var(variable).ok()?;
    let parsed = value.replace('_', "").parse();
    Some(parsed.unwrap_or_else(|_| panic!("{variable} is {value:?}, it must be a number")))
}

fn how_to_repeat(seed: u64) -> String {
    let git = Command::new("git").args(["rev-parse", "HEAD"]).output();
    let commit = git.ok().filter(|output| output.status.success());
    let commit = commit.map_or("unknown".into(), |c| {
        String::from_utf8_lossy(&c.stdout).into()
    });
    let commit: String = commit;
    format!(
        "seed {seed} failed at commit {}; again: LORASERVE_SEED={seed} cargo test -p loraserve-core --test random_operations",
        commit.trim()
    )
}
