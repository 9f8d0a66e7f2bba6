//! The thread pool on real threads.

use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use loraserve_kernels::cpu::threads::ThreadPool;

const LONGER_THAN_WORKERS_SPIN: Duration = Duration::from_micros(200);

#[test]
fn every_task_runs_once_whatever_the_team() {
    for num_threads in 1..6 {
        let pool = ThreadPool::new(Some(num_threads));
        for (first, second) in [(0, 0), (0, 1), (1, 1), (2, 0), (3, 4), (0, 1000), (1, 7)] {
            let num_tasks = first + second;
            let counts: Vec<_> = (0..num_tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run_phases([first, second], &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        }
    }
}

#[test]
fn a_second_phase_may_wait_for_the_first() {
    let pool = ThreadPool::new(Some(3));
    for _ in 0..2000 {
        let pending = AtomicUsize::new(5);
        pool.run_phases([5, 6], &|i| {
            if i < 5 {
                pending.fetch_sub(1, Ordering::Release);
            }
            while i >= 5 && pending.load(Ordering::Acquire) != 0 {
                spin_loop();
            }
        });
    }
}

#[test]
fn parked_workers_wake_for_the_next_job() {
    let pool = ThreadPool::new(Some(2));
    for _ in 0..20 {
        thread::sleep(LONGER_THAN_WORKERS_SPIN);
        let both = AtomicUsize::new(0);
        let start = Instant::now();
        pool.run(2, &|_| {
            both.fetch_add(1, Ordering::SeqCst);
            while both.load(Ordering::SeqCst) < 2 && start.elapsed() < Duration::from_secs(20) {
                thread::yield_now();
            }
        });
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "one thread ran both tasks"
        );
    }
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    let pool = ThreadPool::new(Some(3));
    let result = catch_unwind(AssertUnwindSafe(|| {
        pool.run(64, &|i| assert!(i != 13, "task thirteen"));
    }));
    assert!(result.is_err());
    let sum = AtomicUsize::new(0);
    pool.run(64, &|i| {
        sum.fetch_add(i, Ordering::Relaxed);
    });
    assert_eq!(sum.into_inner(), 64 * 63 / 2);
}

#[test]
fn many_small_jobs_in_a_row_lose_no_task() {
    let pool = ThreadPool::new(Some(4));
    let sum = AtomicUsize::new(0);
    for _ in 0..20_000 {
        pool.run(3, &|_| {
            sum.fetch_add(1, Ordering::Relaxed);
        });
    }
    assert_eq!(sum.into_inner(), 60_000);
}
