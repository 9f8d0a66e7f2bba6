//! Long-lived buffers: cache-line aligned, on huge pages where the system offers them.

mod pages;
pub mod pretouch;
mod scratch;

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

pub use self::pages::PageMemory;
pub(super) use self::scratch::Scratch;

/// One cache line; also the alignment of every packed block.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Zeroed bytes that start on a cache line.
pub struct AlignedBytes {
    lines: Vec<Line>,
}

impl AlignedBytes {
    pub fn zeroed(nbytes: usize) -> Self {
        let num_lines = nbytes.div_ceil(64);
        let mut lines = Vec::with_capacity(num_lines);
        advise_huge_pages(lines.as_ptr() as usize, num_lines * 64);
        lines.resize(num_lines, Line([0; 64]));
        Self { lines }
    }

    pub fn nbytes(&self) -> usize {
        self.lines.len() * 64
    }

    pub fn as_ptr<T>(&self) -> *const T {
        self.lines.as_ptr().cast()
    }

    pub fn as_mut_ptr<T>(&mut self) -> *mut T {
        self.lines.as_mut_ptr().cast()
    }
}

/// Bytes of a chunk of an arena.
const CHUNK_NBYTES: usize = 32 << 20;
/// The size of a huge page on x86-64, and of a common one on Arm.
const HUGE_PAGE: usize = 2 << 20;

/// Memory for many weights, in chunks on huge pages: a weight alone would fill few of them.
#[derive(Default)]
pub struct Arena(Mutex<Option<Open>>);

/// The chunk that has room, and how much of it is taken.
struct Open {
    chunk: Arc<Chunk>,
    used: usize,
}

struct Chunk {
    address: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a chunk is an address; the bytes behind it belong to the `ArenaBytes` that took them.
unsafe impl Send for Chunk {}
// SAFETY: as above.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(nbytes: usize) -> Self {
        let layout = Layout::from_size_align(nbytes, HUGE_PAGE).expect("a weight fits in memory");
        // SAFETY: the size is not zero.
        let address = unsafe { alloc(layout) };
        let address = NonNull::new(address).unwrap_or_else(|| handle_alloc_error(layout));
        advise_huge_pages(address.as_ptr() as usize, nbytes);
        Self { address, layout }
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`.
        unsafe { dealloc(self.address.as_ptr(), self.layout) }
    }
}

/// Zeroed bytes of an arena that start on a cache line; they keep their chunk alive.
pub struct ArenaBytes {
    chunk: Arc<Chunk>,
    offset: usize,
    nbytes: usize,
}

impl Arena {
    /// Takes `nbytes` from the open chunk, or from a new one.
    pub fn take(&self, nbytes: usize) -> ArenaBytes {
        let nbytes = nbytes.next_multiple_of(64);
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let has_room = |open: &mut Open| open.chunk.layout.size() - open.used >= nbytes;
        if !open.as_mut().is_some_and(has_room) {
            let size = nbytes.max(CHUNK_NBYTES).next_multiple_of(HUGE_PAGE);
            *open = Some(Open {
                chunk: Arc::new(Chunk::new(size)),
                used: 0,
            });
        }
        let open = open.as_mut().expect("just opened");
        let mut bytes = ArenaBytes {
            chunk: Arc::clone(&open.chunk),
            offset: open.used,
            nbytes,
        };
        open.used += nbytes;
        // SAFETY: these bytes of the chunk are only in `bytes`.
        unsafe { bytes.as_mut_ptr::<u8>().write_bytes(0, nbytes) };
        bytes
    }
}

impl ArenaBytes {
    pub fn nbytes(&self) -> usize {
        self.nbytes
    }

    pub fn as_ptr<T>(&self) -> *const T {
        self.chunk.address.as_ptr().wrapping_add(self.offset).cast()
    }

    pub fn as_mut_ptr<T>(&mut self) -> *mut T {
        self.as_ptr::<T>().cast_mut()
    }
}

/// Asks the system to back `address..address + nbytes` by huge pages; streaming weights through
/// 4 KiB pages costs a TLB miss every 64 lines. Only a hint: failure changes nothing.
pub fn advise_huge_pages(address: usize, nbytes: usize) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let first = address.next_multiple_of(PAGE);
        let length = (address + nbytes).saturating_sub(first) / PAGE * PAGE;
        if length > 0 {
            // SAFETY: MADV_HUGEPAGE changes how memory is backed, never what it holds.
            unsafe { libc::madvise(first as *mut libc::c_void, length, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (address, nbytes);
}
