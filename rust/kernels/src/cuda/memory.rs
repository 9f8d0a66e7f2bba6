//! Memory, events and the side stream: driver objects that free themselves.

use std::ffi::{c_uint, c_void};
use std::ptr;
use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUevent_flags, CUresult};

use super::driver::Device;
use super::error::{CudaError, Doing};
use super::launch::Stream;

/// An address kernels understand.
pub type DeviceAddress = u64;

/// Zeroed device memory.
pub(super) struct DeviceBuffer {
    device: Arc<Device>,
    address: DeviceAddress,
}

impl DeviceBuffer {
    /// `nbytes` of zeros, there for every stream, 256-byte aligned; `what` they are for is told when there is no room.
    pub fn zeroed(
        device: &Arc<Device>,
        what: &'static str,
        nbytes: usize,
    ) -> Result<Self, CudaError> {
        device.bind()?;
        // SAFETY: the context is current; `drop` frees the memory once.
        let allocated = unsafe { result::malloc_sync(nbytes.max(1)) };
        let address = match allocated {
            Err(error) if error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = device.free_nbytes()?;
                return Err(CudaError::OutOfMemory { what, nbytes, free });
            }
            allocated => allocated.doing("allocating device memory")?,
        };
        let buffer = Self {
            device: Arc::clone(device),
            address,
        };
        // A fill on the default stream is late, and streams that don't block on it don't wait for it.
        let side = SideStream::new(device)?;
        // SAFETY: the range was allocated above.
        unsafe { result::memset_d8_async(address, 0, nbytes.max(1), side.stream().raw()) }
            .doing("clearing device memory")?;
        side.synchronize()?;
        Ok(buffer)
    }

    pub fn address(&self) -> DeviceAddress {
        self.address
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `zeroed`, freed once; the driver waits for kernels that use it.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Page-locked host memory, which the device copies from while the host goes on.
pub(super) struct PinnedBuffer {
    device: Arc<Device>,
    address: *mut u8,
    nbytes: usize,
}

// SAFETY: plain memory, reached through `&self` and `&mut self` only.
unsafe impl Send for PinnedBuffer {}
// SAFETY: as above.
unsafe impl Sync for PinnedBuffer {}

impl PinnedBuffer {
    pub fn zeroed(device: &Arc<Device>, nbytes: usize) -> Result<Self, CudaError> {
        device.bind()?;
        // SAFETY: the context is current; `drop` frees the memory once.
        let address = unsafe { result::malloc_host(nbytes.max(1), 0) }
            .doing("allocating page-locked host memory")?
            .cast::<u8>();
        // SAFETY: the range was allocated above and is ours alone.
        unsafe { address.write_bytes(0, nbytes) };
        Ok(Self {
            device: Arc::clone(device),
            address,
            nbytes,
        })
    }

    pub fn address(&self) -> *const u8 {
        self.address
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: allocated with this length and zeroed; `&mut self` makes it ours alone.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.nbytes) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated in `zeroed`, freed once.
            let _ = unsafe { result::free_host(self.address.cast::<c_void>()) };
        }
    }
}

/// A mark on a stream; a thread that waits for it sleeps.
pub(super) struct Event {
    device: Arc<Device>,
    raw: sys::CUevent,
}

// SAFETY: the driver allows any thread to use an event; the handle is only passed to it.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint
            | CUevent_flags::CU_EVENT_BLOCKING_SYNC as c_uint;
        let mut raw = ptr::null_mut();
        // SAFETY: the pointer is to a live handle; `drop` destroys the event once.
        unsafe { sys::cuEventCreate(&raw mut raw, flags) }.doing("creating an event")?;
        Ok(Self {
            device: Arc::clone(device),
            raw,
        })
    }

    /// Marks what is on `stream` by now.
    pub fn record(&self, stream: Stream) -> Result<(), CudaError> {
        // SAFETY: the event lives; the caller of the context guarantees the stream.
        unsafe { result::event::record(self.raw, stream.raw()) }.doing("recording an event")
    }

    /// Blocks the thread until what was marked last is done; at once if nothing was.
    pub fn wait(&self) -> Result<(), CudaError> {
        // SAFETY: the event lives.
        unsafe { result::event::synchronize(self.raw) }.doing("waiting for an event")
    }

    /// Makes later work of `stream` wait for what was marked last.
    pub fn block(&self, stream: Stream) -> Result<(), CudaError> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream live.
        unsafe { result::stream::wait_event(stream.raw(), self.raw, flags) }
            .doing("ordering streams by an event")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created in `new`, destroyed once; pending uses are finished by the driver.
            let _ = unsafe { result::event::destroy(self.raw) };
        }
    }
}

/// A stream of our own, beside those of the caller.
pub(super) struct SideStream {
    device: Arc<Device>,
    stream: Stream,
}

impl SideStream {
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        device.bind()?;
        let raw = result::stream::create(result::stream::StreamKind::NonBlocking)
            .doing("creating a stream")?;
        Ok(Self {
            device: Arc::clone(device),
            stream: Stream::from_raw(raw),
        })
    }

    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// Blocks the thread until the stream's work is done.
    fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.stream.raw()) }.doing("waiting for a stream")
    }
}

impl Drop for SideStream {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: created in `new`, destroyed once; the driver finishes its work first.
            let _ = unsafe { result::stream::destroy(self.stream.raw()) };
        }
    }
}

/// Queues a copy from page-locked memory to the device.
///
/// # Safety
/// `src` is page-locked and stays unchanged until the copy is done; `dst` is device memory of that length.
pub(super) unsafe fn copy_to_device(
    dst: DeviceAddress,
    src: *const u8,
    nbytes: usize,
    stream: Stream,
) -> Result<(), CudaError> {
    if nbytes == 0 {
        return Ok(());
    }
    // SAFETY: the caller's contract.
    unsafe { sys::cuMemcpyHtoDAsync_v2(dst, src.cast::<c_void>(), nbytes, stream.raw()) }
        .doing("copying to the device")
}

/// Queues a copy from the device to page-locked memory.
///
/// # Safety
/// `dst` is page-locked, has that length, and nobody looks at it until the copy is done; `src` is device memory.
pub(super) unsafe fn copy_to_host(
    dst: *mut u8,
    src: DeviceAddress,
    nbytes: usize,
    stream: Stream,
) -> Result<(), CudaError> {
    // SAFETY: the caller's contract.
    unsafe { sys::cuMemcpyDtoHAsync_v2(dst.cast::<c_void>(), src, nbytes, stream.raw()) }
        .doing("copying from the device")
}

/// Queues a copy between two disjoint ranges of device memory.
///
/// # Safety
/// Both ranges are device memory.
pub(super) unsafe fn copy_on_device(
    dst: DeviceAddress,
    src: DeviceAddress,
    nbytes: usize,
    stream: Stream,
) -> Result<(), CudaError> {
    // SAFETY: the caller's contract.
    unsafe { result::memcpy_dtod_async(dst, src, nbytes, stream.raw()) }
        .doing("copying on the device")
}
