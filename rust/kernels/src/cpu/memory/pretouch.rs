//! Pretouch: a thread that touches a margin of the page pool before it is needed.
//!
//! ```text
//! 0     kv_end                                   adapters_start     nbytes
//! | KV    | margin |         untouched         | margin | adapters    |
//! ```
//!
//! At first touch the system finds and zeroes a huge page, which takes 0.2 ms, or 5 ms on a virtual
//! machine whose host must find it too. The thread takes that from loads and steps. While the model
//! runs on the same cores, half a margin will do, and the thread rests after each huge page. When the
//! margins stand it is parked.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;
use std::{hint, mem, process};

use super::HUGE_PAGE;

/// Bytes kept touched beyond those in use, at each end of the pool; half as many beside a running model.
pub const MARGIN: usize = 64 << 20;
/// Beside a running model, the thread rests this many times as long as a huge page took it.
const RESTS: u32 = 16;
/// The smallest page of any system.
const SMALL_PAGE: usize = 4096;

/// Makes a range of addresses real, and leaves what it holds.
type Touch = fn(Range<usize>);

/// The thread, and what it is told; it ends with the value.
pub struct PoolPretouch {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    base: usize,
    /// The process that has the thread.
    process: u32,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    margins: Margins,
    is_contended: bool,
    is_stopping: bool,
}

impl PoolPretouch {
    /// Begins with an empty pool at `base..base + nbytes`.
    ///
    /// # Safety
    /// The pool stays mapped and writable until this value is stopped or dropped. Others may read
    /// and write it meanwhile.
    pub unsafe fn new(base: usize, nbytes: usize) -> Self {
        // SAFETY: as the caller guarantees.
        unsafe { Self::with(base, nbytes, touch) }
    }

    /// # Safety
    /// As of `new`.
    unsafe fn with(base: usize, nbytes: usize, touch: Touch) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                margins: Margins::new(base..base + nbytes),
                is_contended: false,
                is_stopping: false,
            }),
            changed: Condvar::new(),
        });
        let of_thread = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("loraserve-memory".into())
            .spawn(move || of_thread.run(touch))
            .expect("the operating system can start a thread");
        Self {
            shared,
            thread: Mutex::new(Some(thread)),
            base,
            process: process::id(),
        }
    }

    /// Says that KV blocks lie in the first `end` bytes of the pool.
    pub fn use_below(&self, end: usize) {
        self.shared
            .update(|state| state.margins.use_below(self.base + end));
    }

    /// Says that adapters lie from byte `start` of the pool on.
    pub fn use_above(&self, start: usize) {
        self.shared
            .update(|state| state.margins.use_above(self.base + start));
    }

    /// Says whether the model computes now on the cores the thread runs on.
    pub fn set_contended(&self, is_contended: bool) {
        self.shared
            .update(|state| state.is_contended = is_contended);
    }

    /// Ends the thread, after the huge page it is at.
    pub fn stop(&self) {
        if self.is_in_forked_child() {
            return; // it has no thread, and locks may be held for ever
        }
        self.shared.update(|state| state.is_stopping = true);
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            // Touching doesn't panic, so joining can't fail.
            let _ = thread.join();
        }
    }

    fn is_in_forked_child(&self) -> bool {
        process::id() != self.process
    }
}

impl Drop for PoolPretouch {
    fn drop(&mut self) {
        if self.is_in_forked_child() {
            let thread = self.thread.get_mut();
            mem::forget(thread.unwrap_or_else(PoisonError::into_inner).take());
        } else {
            self.stop();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        if state.is_stopping || !state.is_contended || state.margins.are_short(MARGIN / 2) {
            self.changed.notify_one();
        }
    }

    fn run(&self, touch: Touch) {
        let mut state = self.lock();
        while !state.is_stopping {
            let margin = MARGIN / if state.is_contended { 2 } else { 1 };
            let Some(range) = state.margins.next_huge_page(margin) else {
                let waited = self.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let start = Instant::now();
            touch(range);
            let rest = start.elapsed() * RESTS;
            state = self.lock();
            let is_resting = |state: &mut State| state.is_contended && !state.is_stopping;
            let rested = self.changed.wait_timeout_while(state, rest, is_resting);
            state = rested.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Which addresses are in use or touched, and how far that should reach.
///
/// Memory that was used once stays touched, so the untouched range only shrinks.
struct Margins {
    kv_end: usize,
    adapters_start: usize,
    untouched: Range<usize>,
}

impl Margins {
    fn new(pool: Range<usize>) -> Self {
        Self {
            kv_end: pool.start,
            adapters_start: pool.end,
            untouched: pool,
        }
    }

    fn use_below(&mut self, end: usize) {
        self.kv_end = self.kv_end.max(end);
        self.untouched.start = self.untouched.start.max(end.min(self.untouched.end));
    }

    fn use_above(&mut self, start: usize) {
        self.adapters_start = self.adapters_start.min(start);
        self.untouched.end = self.untouched.end.min(start.max(self.untouched.start));
    }

    /// Bytes touched above KV blocks and below adapters.
    fn nbytes(&self) -> (usize, usize) {
        let above_kv = self.untouched.start.saturating_sub(self.kv_end);
        let below_adapters = self.adapters_start.saturating_sub(self.untouched.end);
        (above_kv, below_adapters)
    }

    fn are_short(&self, margin: usize) -> bool {
        let (above_kv, below_adapters) = self.nbytes();
        !self.untouched.is_empty() && above_kv.min(below_adapters) < margin
    }

    /// Takes the next huge page, or the part of it that is untouched, where the margin is smaller.
    fn next_huge_page(&mut self, margin: usize) -> Option<Range<usize>> {
        if !self.are_short(margin) {
            return None;
        }
        let untouched = self.untouched.clone();
        let (above_kv, below_adapters) = self.nbytes();
        if above_kv < below_adapters {
            let end = (untouched.start + 1).next_multiple_of(HUGE_PAGE);
            self.untouched.start = end.min(untouched.end);
            Some(untouched.start..self.untouched.start)
        } else {
            let start = (untouched.end - 1) / HUGE_PAGE * HUGE_PAGE;
            self.untouched.end = start.max(untouched.start);
            Some(self.untouched.end..untouched.end)
        }
    }
}

/// Writes to every page of `range` without a change.
///
/// `MADV_POPULATE_WRITE` would hold the lock of the whole address space meanwhile: on a machine where a
/// huge page takes 5 ms, every allocation of the process that maps memory then waits as long.
fn touch(range: Range<usize>) {
    for address in range.step_by(SMALL_PAGE) {
        // SAFETY: the byte is mapped, see `PoolPretouch::new`. Others may write it at the same time,
        // which an atomic exchange leaves alone.
        let byte = unsafe { AtomicU8::from_ptr(address as *mut u8) };
        // Zero for zero. Reading would map the shared page of zeros; a byte that is something else
        // was written before. The compiler may drop a `fetch_or` of zero.
        let zero = hint::black_box(0);
        let _ = byte.compare_exchange(zero, zero, Ordering::Relaxed, Ordering::Relaxed);
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests;
