//! The page pool as the kernels address it.

use crate::KernelError;
use crate::error::check_end;

/// Alignment in bytes of the pool and of its pages: a cache line, the widest vector.
const PAGE_ALIGN: usize = 64;

/// The page pool: memory owned by the caller, addressed by page.
#[derive(Clone, Copy, Debug)]
pub struct PageMemory {
    base: usize,
    nbytes: usize,
    page_nbytes: usize,
}

impl PageMemory {
    /// # Safety
    /// `base..base + nbytes` stays writable, and is touched by nobody else while an op runs.
    pub unsafe fn new(base: usize, nbytes: usize, page_nbytes: usize) -> Result<Self, KernelError> {
        if base == 0 || page_nbytes == 0 {
            let message =
                format!("pool at {base:#x} with pages of {page_nbytes} bytes holds no pages");
            return Err(KernelError::Invalid(message));
        }
        if !base.is_multiple_of(PAGE_ALIGN) || !page_nbytes.is_multiple_of(PAGE_ALIGN) {
            let message = format!(
                "pool at {base:#x} with pages of {page_nbytes} bytes is not 64-byte aligned"
            );
            return Err(KernelError::Invalid(message));
        }
        check_end("end of the pool", base, nbytes, isize::MAX as usize)?;
        Ok(Self {
            base,
            nbytes,
            page_nbytes,
        })
    }

    pub fn num_pages(&self) -> usize {
        self.nbytes / self.page_nbytes
    }

    pub fn page_nbytes(&self) -> usize {
        self.page_nbytes
    }

    pub fn base(&self) -> usize {
        self.base
    }

    pub fn nbytes(&self) -> usize {
        self.nbytes
    }

    /// Address of a page below `num_pages`.
    pub fn page<E>(&self, page: usize) -> *mut E {
        (self.base + page * self.page_nbytes) as *mut E
    }
}
