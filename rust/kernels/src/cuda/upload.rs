//! Adapters host to device while other sequences decode: chunks through page-locked memory, on a
//! stream of their own.

use std::sync::{Arc, Mutex, PoisonError};

use super::driver::Device;
use super::error::CudaError;
use super::launch::Stream;
use super::memory::{DeviceAddress, Event, PinnedBuffer, SideStream, copy_to_device};

/// Bytes of a chunk: long enough for full speed, short enough to fill one while another is copied.
const CHUNK_NBYTES: usize = 4 << 20;

/// The side stream and its buffers; one upload at a time.
pub(super) struct Uploader {
    device: Arc<Device>,
    side: SideStream,
    /// What uploads wait for: earlier users of the memory they write.
    gate: Event,
    chunks: Mutex<[Chunk; 2]>,
}

struct Chunk {
    buffer: PinnedBuffer,
    copied: Event,
}

impl Chunk {
    fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self {
            buffer: PinnedBuffer::zeroed(device, CHUNK_NBYTES)?,
            copied: Event::new(device)?,
        })
    }
}

impl Uploader {
    pub fn new(device: &Arc<Device>) -> Result<Self, CudaError> {
        Ok(Self {
            device: Arc::clone(device),
            side: SideStream::new(device)?,
            gate: Event::new(device)?,
            chunks: Mutex::new([Chunk::new(device)?, Chunk::new(device)?]),
        })
    }

    /// Uploads that begin from now on wait for what is on `stream` by now.
    pub fn wait_for(&self, stream: Stream) -> Result<(), CudaError> {
        self.gate.record(stream)
    }

    /// Copies `bytes` to `dst` and returns when they are there.
    ///
    /// # Safety
    /// `dst` is device memory of that length; what is on any stream and uses it was there at the
    /// last `wait_for`.
    pub unsafe fn upload(&self, dst: DeviceAddress, bytes: &[u8]) -> Result<(), CudaError> {
        self.device.bind()?;
        let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = self.side.stream();
        self.gate.block(stream)?;
        for (index, part) in bytes.chunks(CHUNK_NBYTES).enumerate() {
            let Chunk { buffer, copied } = &mut chunks[index % 2];
            copied.wait()?;
            buffer.bytes()[..part.len()].copy_from_slice(part);
            let dst = dst + (index * CHUNK_NBYTES) as u64;
            // SAFETY: page-locked, and untouched until `copied` has fired; the caller's contract for `dst`.
            unsafe { copy_to_device(dst, buffer.address(), part.len(), stream) }?;
            copied.record(stream)?;
        }
        chunks.iter().try_for_each(|chunk| chunk.copied.wait())
    }
}
