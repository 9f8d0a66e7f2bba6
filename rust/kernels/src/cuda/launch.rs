//! A kernel launch: where, how many threads, which parameters.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::{result, sys};

use super::error::{CudaError, Doing};

/// Parameters a kernel may have.
const MAX_PARAMS: usize = 32;

/// A stream of the caller's, as torch and the driver API number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stream(usize);

impl Stream {
    /// From a `CUstream` as an integer; 0 is the default stream.
    pub fn new(handle: usize) -> Self {
        Self(handle)
    }

    pub(super) fn from_raw(raw: sys::CUstream) -> Self {
        Self(raw as usize)
    }

    pub(super) fn raw(self) -> sys::CUstream {
        self.0 as sys::CUstream
    }
}

/// How many blocks and threads, and how much dynamic shared memory a block has.
#[derive(Clone, Copy, Debug)]
pub(super) struct Grid {
    pub blocks: [u32; 3],
    pub threads: u32,
    pub shared_nbytes: u32,
}

/// A value a kernel takes as parameter, by its bytes.
///
/// # Safety
/// The type has the size and alignment of the kernel's parameter type, and no padding.
pub(super) unsafe trait KernelParam {}

// SAFETY: int.
unsafe impl KernelParam for i32 {}
// SAFETY: unsigned int.
unsafe impl KernelParam for u32 {}
// SAFETY: unsigned long long, or a pointer.
unsafe impl KernelParam for u64 {}
// SAFETY: float.
unsafe impl KernelParam for f32 {}

/// A kernel of a loaded module; modules live as long as the backend.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub(super) function: sys::CUfunction,
}

// SAFETY: the handle is only passed to the driver, which allows any thread to launch.
unsafe impl Send for Kernel {}

impl Kernel {
    /// Puts a launch on `stream`. An empty grid launches nothing.
    ///
    /// # Safety
    /// The device is current on this thread, `params` are the kernel's, in order and type, and the
    /// addresses among them are good for what the kernel reads and writes until it has run.
    pub unsafe fn launch(
        self,
        grid: Grid,
        stream: Stream,
        params: &[&dyn KernelParam],
    ) -> Result<(), CudaError> {
        let [x, y, z] = grid.blocks;
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        let mut addresses = [ptr::null_mut::<c_void>(); MAX_PARAMS];
        for (address, &param) in addresses[..params.len()].iter_mut().zip(params) {
            *address = ptr::from_ref(param).cast_mut().cast();
        }
        let (function, threads) = (self.function, (grid.threads, 1, 1));
        // SAFETY: the caller's contract; the driver copies the parameters before it returns.
        unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                threads,
                grid.shared_nbytes,
                stream.raw(),
                &mut addresses[..params.len()],
            )
        }
        .doing("launching a kernel")
    }
}
