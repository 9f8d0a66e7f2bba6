//! The thread pool under every interleaving, and every order of memory accesses, of small jobs: loom runs the pool's own
//! source with loom's atomics, locks and threads (`sync` below) in place of the standard library's.
//!
//! What loom can't see: `SeqCst` counts as acquire and release, so it also tries orders in which a parked worker misses
//! its call. A job ends without that worker, which is what the pool promises.

mod sync {
    //! In place of `cpu/sync.rs`; no time passes in a model, so workers park once they have looked.

    use std::time::Duration;

    pub use loom::cell::UnsafeCell;
    pub use loom::hint::spin_loop;
    pub use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
    pub use loom::sync::{Arc, Mutex, MutexGuard};
    pub use loom::thread::{Builder, JoinHandle, park, yield_now};

    pub const SPINS_PER_CHECK: u32 = 1;

    pub struct Instant;

    impl Instant {
        pub fn now() -> Self {
            Self
        }

        #[allow(clippy::unused_self)] // as of `std::time::Instant`
        pub fn elapsed(&self) -> Duration {
            Duration::MAX
        }
    }
}

#[allow(dead_code)]
#[path = "../src/cpu/threads/mod.rs"]
mod threads;

use std::panic::{AssertUnwindSafe, catch_unwind};

use loom::cell::UnsafeCell;

use threads::ThreadPool;

/// What tasks write without synchronising: loom fails where two touch one at a time, or a write is not seen.
struct Cells(Vec<UnsafeCell<usize>>);

// SAFETY: loom checks what the pool promises, that a cell is touched by one task at a time.
unsafe impl Sync for Cells {}

impl Cells {
    fn new(len: usize) -> Self {
        Self((0..len).map(|_| UnsafeCell::new(0)).collect())
    }

    fn add_one(&self, index: usize) {
        // SAFETY: see `Cells`.
        self.0[index].with_mut(|cell| unsafe { *cell += 1 });
    }

    fn values(&self) -> Vec<usize> {
        // SAFETY: see `Cells`.
        let read = |cell: &UnsafeCell<usize>| cell.with(|value| unsafe { *value });
        self.0.iter().map(read).collect()
    }
}

/// Every interleaving with at most so many preemptions, which takes seconds.
fn model(preemptions: usize, program: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(program);
}

#[test]
fn every_task_runs_once_and_is_seen_by_the_caller() {
    model(3, || {
        let pool = ThreadPool::new(Some(2));
        for _ in 0..2 {
            let cells = Cells::new(2);
            pool.run(2, &|index| cells.add_one(index));
            assert_eq!(cells.values(), [1, 1]);
        }
    });
}

#[test]
fn three_threads_share_a_job() {
    model(2, || {
        let pool = ThreadPool::new(Some(3));
        let cells = Cells::new(3);
        pool.run(3, &|index| cells.add_one(index));
        assert_eq!(cells.values(), [1, 1, 1]);
    });
}

#[test]
fn both_phases_run_once() {
    model(3, || {
        let pool = ThreadPool::new(Some(2));
        let cells = Cells::new(3);
        pool.run_phases([1, 2], &|index| cells.add_one(index));
        assert_eq!(cells.values(), [1, 1, 1]);
    });
}

#[test]
fn a_panic_of_any_task_reaches_the_caller_when_no_task_is_left() {
    model(3, || {
        let pool = ThreadPool::new(Some(2));
        let cells = Cells::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(2, &|index| {
                cells.add_one(index);
                // Without the hook, which would print every interleaving.
                if index == 1 {
                    std::panic::resume_unwind(Box::new("task one"));
                }
            });
        }));
        assert!(result.is_err());
        assert_eq!(cells.values(), [1, 1]);
        pool.run(2, &|index| cells.add_one(index));
        assert_eq!(cells.values(), [2, 2]);
    });
}

#[test]
fn two_callers_take_turns() {
    model(2, || {
        let pool = loom::sync::Arc::new(ThreadPool::new(Some(2)));
        let other = loom::sync::Arc::clone(&pool);
        let caller = loom::thread::spawn(move || {
            let cells = Cells::new(2);
            other.run(2, &|index| cells.add_one(index));
            assert_eq!(cells.values(), [1, 1]);
        });
        let cells = Cells::new(2);
        pool.run(2, &|index| cells.add_one(index));
        assert_eq!(cells.values(), [1, 1]);
        caller.join().unwrap();
    });
}

#[test]
fn a_pool_ends_whatever_its_workers_are_at() {
    model(3, || drop(ThreadPool::new(Some(3))));
}
