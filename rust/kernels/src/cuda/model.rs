//! What kernels need to know of the model and of the largest step; fixed once the backend is made.

use loraserve_adapters::{NUM_GROUPS, StorageDtype};

use super::memory::DeviceAddress;
use crate::KernelError;
use crate::error::{check_below, check_end};
use crate::geometry::KvGeometry;

/// Alignment in bytes of the pool and of its pages.
const PAGE_ALIGN: usize = 64;
/// Columns of a tile: kernels read A 32 elements of K at a time.
const K_MULTIPLE: usize = 32;
/// Elements of a 16-byte load.
const HEAD_DIM_MULTIPLE: usize = 8;
/// Largest head whose accumulators fit a thread's registers.
const MAX_HEAD_DIM: usize = 256;
/// Columns of B's panels.
const OUT_MULTIPLE: usize = 16;

/// One fused projection.
#[derive(Clone, Copy, Debug)]
pub struct GroupShape {
    pub in_features: usize,
    pub out_features: usize,
}

/// The largest step and the most adapters.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub max_num_slots: usize,
    pub max_num_tokens: usize,
    pub max_num_seqs: usize,
    /// Largest sum of the padded ranks of a group's modules.
    pub max_group_rank: usize,
}

/// The page pool, device memory of the caller's.
#[derive(Clone, Copy, Debug)]
pub struct Pool {
    pub base: DeviceAddress,
    pub nbytes: usize,
    pub page_nbytes: usize,
}

impl Pool {
    pub fn num_pages(&self) -> usize {
        self.nbytes / self.page_nbytes
    }

    /// Address of a page below `num_pages`.
    pub fn page(&self, page: usize) -> DeviceAddress {
        self.base + (page * self.page_nbytes) as u64
    }
}

/// A model as kernels see it.
#[derive(Clone, Copy, Debug)]
pub struct Model {
    pub dtype: StorageDtype,
    pub geometry: KvGeometry,
    pub groups: [GroupShape; NUM_GROUPS],
    pub limits: Limits,
    pub pool: Pool,
    /// Of the device.
    pub num_sms: usize,
}

impl Model {
    /// Refuses shapes and limits the kernels were not written for.
    pub fn check(&self) -> Result<(), KernelError> {
        self.geometry.check()?;
        if self.dtype == StorageDtype::Float32 {
            let message = "dtype is float32, CUDA kernels store bfloat16 or float16";
            return Err(KernelError::Invalid(message.into()));
        }
        let head_dim = self.geometry.head_dim;
        check_multiple("head_dim", head_dim, HEAD_DIM_MULTIPLE)?;
        check_below("head_dim", head_dim as i64, MAX_HEAD_DIM as i64 + 1)?;
        for group in self.groups {
            check_multiple("in_features", group.in_features, K_MULTIPLE)?;
            check_multiple("out_features", group.out_features, OUT_MULTIPLE)?;
        }
        let limit = i64::from(i32::MAX);
        let limits = &self.limits;
        check_below("max_num_slots", limits.max_num_slots as i64, limit)?;
        check_below("max_num_tokens", limits.max_num_tokens as i64, limit)?;
        check_below("max_num_seqs", limits.max_num_seqs as i64, limit)?;
        check_multiple("max_group_rank", limits.max_group_rank, 8)?;
        self.check_pool()
    }

    fn check_pool(&self) -> Result<(), KernelError> {
        let pool = &self.pool;
        let is_aligned = (pool.base as usize).is_multiple_of(PAGE_ALIGN);
        if pool.base == 0 || !is_aligned || !pool.page_nbytes.is_multiple_of(PAGE_ALIGN) {
            let message = format!(
                "pool at {:#x} with pages of {} bytes is not {PAGE_ALIGN}-byte aligned",
                pool.base, pool.page_nbytes
            );
            return Err(KernelError::Invalid(message));
        }
        let limit = isize::MAX as usize;
        check_end("end of the pool", pool.base as usize, pool.nbytes, limit)?;
        Ok(())
    }
}

/// Refuses zero and what is no multiple of `multiple`.
pub(super) fn check_multiple(
    what: &'static str,
    value: usize,
    multiple: usize,
) -> Result<(), KernelError> {
    if value > 0 && value.is_multiple_of(multiple) && i32::try_from(value).is_ok() {
        return Ok(());
    }
    let message = format!("{what} is {value}, CUDA kernels need a multiple of {multiple}");
    Err(KernelError::Invalid(message))
}
