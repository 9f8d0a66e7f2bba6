//! `Pending`: tasks of a job that later tasks of the same job wait for.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::yield_now;

/// How many of some tasks have not ended yet.
pub struct Pending(AtomicUsize);

impl Pending {
    pub fn new(num_tasks: usize) -> Self {
        Self(AtomicUsize::new(num_tasks))
    }

    /// For the time of one task: dropped, it counts as ended, after a panic too, so that nobody waits for ever.
    pub fn task(&self) -> PendingTask<'_> {
        PendingTask(&self.0)
    }

    /// Returns when every task has ended; they must have been started.
    pub fn wait(&self) {
        let mut spins = 0_u32;
        while self.0.load(Ordering::Acquire) != 0 {
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(1 << 14) {
                yield_now();
            } else {
                spin_loop();
            }
        }
    }
}

/// One task that is running.
pub struct PendingTask<'a>(&'a AtomicUsize);

impl Drop for PendingTask<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}
