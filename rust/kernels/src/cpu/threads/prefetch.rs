//! Prefetching what a coming job reads, by threads that have nothing to do.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What a thread prefetches at most: L2 is wanted for adapters and activations too.
const LIMIT_NBYTES: usize = 1 << 18;
/// Cache lines prefetched between two looks for work.
const LINES: usize = 4;
const LINE_NBYTES: usize = 64;

/// The memory that is wanted next.
#[derive(Default)]
pub(super) struct PrefetchRange {
    address: AtomicUsize,
    nbytes: AtomicUsize,
}

impl PrefetchRange {
    pub fn set(&self, address: usize, nbytes: usize) {
        self.nbytes.store(nbytes, Ordering::Relaxed);
        self.address.store(address, Ordering::Relaxed);
    }
}

/// How far one thread has prefetched its share.
pub(super) struct Prefetcher {
    thread: usize,
    team: usize,
    /// What the share is of.
    address: usize,
    next: usize,
    end: usize,
}

impl Prefetcher {
    pub fn new(thread: usize, team: usize) -> Self {
        Self {
            thread,
            team,
            address: 0,
            next: 0,
            end: 0,
        }
    }

    /// Prefetches a few lines; false when nothing is left.
    pub fn prefetch_some(&mut self, range: &PrefetchRange) -> bool {
        let address = range.address.load(Ordering::Relaxed);
        if address != self.address {
            let nbytes = range.nbytes.load(Ordering::Relaxed);
            let share = |thread: usize| address + nbytes * thread / self.team;
            self.address = address;
            self.next = share(self.thread);
            self.end = share(self.thread + 1).min(self.next + LIMIT_NBYTES);
        }
        if self.next >= self.end {
            return false;
        }
        for line in 0..LINES {
            prefetch(self.next + line * LINE_NBYTES);
        }
        self.next += LINES * LINE_NBYTES;
        true
    }
}

/// Prefetches a line to L2.
fn prefetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; the address need not be valid.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address as *const i8);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
