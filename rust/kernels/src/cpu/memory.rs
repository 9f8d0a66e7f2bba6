//! Long-lived buffers: cache-line aligned, on huge pages where the system offers them.

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
