//! Fetching into the caches what a coming job reads, by threads that have nothing to do.

use std::sync::atomic::{AtomicUsize, Ordering};

/// What a thread fetches at most: the second-level cache is wanted for adapters and activations too.
const LIMIT_NBYTES: usize = 1 << 18;
/// Cache lines fetched between two looks for work.
const LINES: usize = 4;
const LINE_NBYTES: usize = 64;

/// The memory that is wanted next.
#[derive(Default)]
pub(super) struct Ahead {
    address: AtomicUsize,
    nbytes: AtomicUsize,
}

impl Ahead {
    pub fn set(&self, address: usize, nbytes: usize) {
        self.nbytes.store(nbytes, Ordering::Relaxed);
        self.address.store(address, Ordering::Relaxed);
    }
}

/// How far one thread has fetched its share.
pub(super) struct Fetcher {
    thread: usize,
    team: usize,
    /// What the share is of.
    address: usize,
    next: usize,
    end: usize,
}

impl Fetcher {
    pub fn new(thread: usize, team: usize) -> Self {
        Self {
            thread,
            team,
            address: 0,
            next: 0,
            end: 0,
        }
    }

    /// Fetches a few lines; false when nothing is left.
    pub fn fetch_some(&mut self, ahead: &Ahead) -> bool {
        let address = ahead.address.load(Ordering::Relaxed);
        if address != self.address {
            let nbytes = ahead.nbytes.load(Ordering::Relaxed);
            let share = |thread: usize| address + nbytes * thread / self.team;
            self.address = address;
            self.next = share(self.thread);
            self.end = share(self.thread + 1).min(self.next + LIMIT_NBYTES);
        }
        if self.next >= self.end {
            return false;
        }
        for line in 0..LINES {
            fetch(self.next + line * LINE_NBYTES);
        }
        self.next += LINES * LINE_NBYTES;
        true
    }
}

/// Asks for a line in the second-level cache.
fn fetch(address: usize) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint; the address need not be valid.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(address as *const i8);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}
