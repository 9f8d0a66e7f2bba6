//! Working memory of one thread, kept between tasks so that the step path allocates nothing.

use std::cell::RefCell;

thread_local! {
    /// What is not in use; as many as were in use at once.
    static KEPT: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Floats of unspecified content; returned to the thread when dropped. A guard and not a closure,
/// because kernels must inline into the function that enables their instructions.
pub struct Scratch(Vec<f32>);

impl Scratch {
    pub fn take(len: usize) -> Self {
        let mut floats = KEPT.with_borrow_mut(|kept| kept.pop().unwrap_or_default());
        if floats.len() < len {
            floats.resize(len, 0.0);
        }
        Self(floats)
    }

    pub fn as_mut_ptr(&mut self) -> *mut f32 {
        self.0.as_mut_ptr()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        KEPT.with_borrow_mut(|kept| kept.push(std::mem::take(&mut self.0)));
    }
}
