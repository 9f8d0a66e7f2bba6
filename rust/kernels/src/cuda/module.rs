//! Compiled code on the device.

use std::ffi::{CString, c_void};
use std::sync::Arc;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{result, sys};

use super::driver::Device;
use super::error::{CudaError, Doing};
use super::launch::Kernel;
use super::target::Target;

/// Shared memory a kernel has without asking, bytes.
const DEFAULT_SHARED_NBYTES: usize = 48 << 10;
/// What drivers say to code in a form, of a version or for an architecture that they don't take.
const REFUSALS: [CUresult; 4] = [
    CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU,
    CUresult::CUDA_ERROR_INVALID_IMAGE,
    CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION,
    CUresult::CUDA_ERROR_JIT_COMPILATION_DISABLED,
];

/// One compiled source, loaded until this is dropped.
pub(super) struct Module {
    device: Arc<Device>,
    raw: sys::CUmodule,
}

// SAFETY: the driver allows any thread to use a module; the handle is only passed to it.
unsafe impl Send for Module {}

impl Module {
    /// `code` is what NVRTC made for `target`; PTX ends in NUL.
    ///
    /// # Errors
    /// `CodeRefused` where the driver takes no such code.
    pub fn load(device: &Arc<Device>, code: &[u8], target: Target) -> Result<Self, CudaError> {
        device.bind()?;
        // SAFETY: PTX ends in NUL and machine code has its length in itself; the driver copies what it needs.
        let raw = match unsafe { result::module::load_data(code.as_ptr().cast::<c_void>()) } {
            Err(error) if REFUSALS.contains(&error.0) => {
                return Err(CudaError::refused(target, error));
            }
            loaded => loaded.doing("loading a kernel module")?,
        };
        Ok(Self {
            device: Arc::clone(device),
            raw,
        })
    }

    /// A kernel; it may use as much shared memory as the device has.
    pub fn function(&self, name: &str) -> Result<Kernel, CudaError> {
        self.device.bind()?;
        let c_name = CString::new(name).expect("kernel names hold no NUL");
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(self.raw, c_name) }
            .doing("looking up a kernel")?;
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
        // SAFETY: the function was found above.
        let own = unsafe { result::function::get_function_attribute(function, attribute) }
            .doing("asking for a kernel's shared memory")?;
        let max_shared_nbytes = self.device.properties.max_shared_nbytes;
        let room = max_shared_nbytes.saturating_sub(own as usize);
        if room > DEFAULT_SHARED_NBYTES {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was found above.
            unsafe { result::function::set_function_attribute(function, attribute, room as i32) }
                .doing("raising a kernel's shared memory")?;
        }
        Ok(Kernel { function })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: loaded once, unloaded once; kernels of it are launched by its owner only.
            let _ = unsafe { result::module::unload(self.raw) };
        }
    }
}
