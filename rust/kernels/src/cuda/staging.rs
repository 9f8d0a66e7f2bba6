//! Small copies host to device on the caller's stream: page-locked buffers in turn, so that the next may
//! be filled while the device still reads the last.

use std::sync::{Arc, Mutex, PoisonError};

use super::driver::Device;
use super::error::CudaError;
use super::launch::Stream;
use super::memory::{DeviceAddress, Event, PinnedBuffer, copy_to_device};

/// Steps the host may run ahead of the device before it waits.
const NUM_BUFFERS: usize = 4;

/// Page-locked buffers of one length, used in turn.
pub(super) struct StagingRing {
    nbytes: usize,
    turns: Mutex<Turns>,
}

struct Turns {
    next: usize,
    buffers: Vec<(PinnedBuffer, Event)>,
}

impl StagingRing {
    pub fn new(device: &Arc<Device>, nbytes: usize) -> Result<Self, CudaError> {
        let buffer = |_| Ok((PinnedBuffer::zeroed(device, nbytes)?, Event::new(device)?));
        let buffers = (0..NUM_BUFFERS)
            .map(buffer)
            .collect::<Result<_, CudaError>>()?;
        Ok(Self {
            nbytes,
            turns: Mutex::new(Turns { next: 0, buffers }),
        })
    }

    pub fn nbytes(&self) -> usize {
        self.nbytes
    }

    /// Lets `fill` write a buffer and queues the copy of what it says it wrote, from the buffer's start.
    ///
    /// # Safety
    /// The device is current, and `dst` is device memory of the ring's length.
    pub unsafe fn copy(
        &self,
        dst: DeviceAddress,
        stream: Stream,
        fill: impl FnOnce(&mut [u8]) -> usize,
    ) -> Result<(), CudaError> {
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = turns.next;
        turns.next = (turn + 1) % turns.buffers.len();
        let (buffer, copied) = &mut turns.buffers[turn];
        copied.wait()?;
        let nbytes = fill(buffer.bytes());
        assert!(nbytes <= self.nbytes, "a copy is longer than its buffer");
        // SAFETY: page-locked, and untouched until `copied` has fired; the caller's contract for `dst`.
        unsafe { copy_to_device(dst, buffer.address(), nbytes, stream) }?;
        copied.record(stream)
    }
}

/// Writes values at a byte offset, in the device's byte order; returns the offset behind them.
pub(super) fn write<T: Plain>(bytes: &mut [u8], offset: usize, values: &[T]) -> usize {
    let len = size_of_val(values);
    // SAFETY: `T` is plain, so its bytes may be read.
    let source = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), len) };
    bytes[offset..offset + len].copy_from_slice(source);
    offset + len
}

/// A value whose bytes may be copied to the device.
///
/// # Safety
/// `repr(C)` or a number, without padding.
pub(super) unsafe trait Plain: Copy {}

// SAFETY: a number.
unsafe impl Plain for i32 {}
// SAFETY: a number.
unsafe impl Plain for u32 {}
// SAFETY: a number.
unsafe impl Plain for f32 {}
// SAFETY: its padding is a field; the size is asserted where it is defined.
unsafe impl Plain for crate::sampling::RowParams {}
// SAFETY: four numbers of four bytes.
unsafe impl Plain for super::work_list::WorkItem {}
// SAFETY: its padding is a field; the size is asserted where it is defined.
unsafe impl Plain for super::adapter_table::Group {}
