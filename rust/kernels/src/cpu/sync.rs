//! What the thread pool synchronises with, and how long it spins: the standard library, in whose place
//! `tests/threads_model.rs` puts loom.

use std::cell;

pub use std::hint::spin_loop;
pub use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
pub use std::sync::{Arc, Mutex, MutexGuard};
pub use std::thread::{Builder, JoinHandle, park, yield_now};
pub use std::time::Instant;

/// Spins between two looks at the clock.
pub const SPINS_PER_CHECK: u32 = 64;

/// As `std::cell::UnsafeCell`; a model sees how long the pointer is used.
pub struct UnsafeCell<T>(cell::UnsafeCell<T>);

impl<T> UnsafeCell<T> {
    pub fn new(value: T) -> Self {
        Self(cell::UnsafeCell::new(value))
    }

    /// Reads through the pointer.
    pub fn with<R>(&self, read: impl FnOnce(*const T) -> R) -> R {
        read(self.0.get())
    }

    /// Writes through the pointer.
    pub fn with_mut<R>(&self, write: impl FnOnce(*mut T) -> R) -> R {
        write(self.0.get())
    }
}
