//! bf16 products in Intel AMX tiles: eight registers of 16 rows × 64 bytes.
//!
//! ```text
//! C [16 rows][16 columns] f32  +=  A [16 rows][32 k] bf16  ·  B [16 pairs of k][16 columns][2] bf16
//! ```
//! B is a stretch of a packed panel, A is x as it lies in memory. Each product is one block of
//! assembly, because the compiler does not know that tiles hold values between two blocks. Tiles treat
//! denormal numbers as zero.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows and columns of a tile of f32.
pub const TILE: usize = 16;
/// Elements along K of one tile of bf16.
pub const TILE_K: usize = 32;

/// Four tiles of f32.
#[derive(Default)]
#[repr(align(64))]
pub struct Product(pub [[[f32; TILE]; TILE]; 4]);

/// Operand of `ldtilecfg`.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_nbytes: [u16; 16],
    num_rows: [u8; 16],
}

/// This thread's tiles, configured until dropped.
pub struct Tiles(PhantomData<*const ()>);

#[allow(clippy::unused_self)] // `self` proves that the tiles are configured
impl Tiles {
    /// Tiles for `two_by_two`.
    ///
    /// # Safety
    /// `is_supported` returned true.
    pub unsafe fn full() -> Self {
        // SAFETY: the caller's contract.
        unsafe { Self::configure([TILE as u8; 8]) }
    }

    /// Tiles for `one_by_four` of `num_rows ≤ 16` rows.
    ///
    /// # Safety
    /// `is_supported` returned true.
    pub unsafe fn of_rows(num_rows: usize) -> Self {
        let (rows, all) = (num_rows as u8, TILE as u8);
        // SAFETY: the caller's contract.
        unsafe { Self::configure([rows, rows, rows, rows, rows, all, all, all]) }
    }

    unsafe fn configure(rows: [u8; 8]) -> Self {
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_nbytes: [0; 16],
            num_rows: [0; 16],
        };
        config.row_nbytes[..8].fill(64);
        config.num_rows[..8].copy_from_slice(&rows);
        // SAFETY: the CPU and the kernel allow tiles; the operand is a valid palette.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _);
        }
        Self(PhantomData)
    }

    /// Tiles 0, 1 of `out`: rows of `x[0]` times both panels; 2, 3: rows of `x[1]`.
    ///
    /// Unless `ahead` is 0, what lies that many bytes after the panels is fetched to the second-level
    /// cache.
    ///
    /// # Safety
    /// Made by `full`; 16 rows `x_stride` bytes apart at each x, and panels, of 32·`num_blocks`
    /// elements along K.
    pub unsafe fn two_by_two(
        &self,
        x: [*const u8; 2],
        x_stride: usize,
        panels: [*const u8; 2],
        ahead: usize,
        num_blocks: usize,
        out: &mut Product,
    ) {
        // SAFETY: reads what the caller guarantees, writes `out`.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{b0} + {line}]",
                "tileloadd tmm4, [{a0} + {x_stride}]",
                "tileloadd tmm7, [{b1} + {line}]",
                "tileloadd tmm5, [{a1} + {x_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "test {ahead}, {ahead}",
                "jz 3f",
                ".irp i, 0,64,128,192,256,320,384,448,512,576,640,704,768,832,896,960",
                "prefetcht1 [{b0} + {ahead} + \\i]",
                "prefetcht1 [{b1} + {ahead} + \\i]",
                ".endr",
                "3:",
                "add {a0}, 64", "add {a1}, 64", "add {b0}, 1024", "add {b1}, 1024",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {line}], tmm0",
                "tilestored [{c} + {line} + 1024], tmm1",
                "tilestored [{c} + {line} + 2048], tmm2",
                "tilestored [{c} + {line} + 3072], tmm3",
                a0 = inout(reg) x[0] => _, a1 = inout(reg) x[1] => _,
                b0 = inout(reg) panels[0] => _, b1 = inout(reg) panels[1] => _,
                n = inout(reg) num_blocks => _,
                x_stride = in(reg) x_stride, ahead = in(reg) ahead,
                line = in(reg) 64_usize, c = in(reg) out,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// Tiles of `out`: the rows of `x` times each panel; what lies `ahead` bytes after the weights in
    /// use is fetched.
    ///
    /// # Safety
    /// Made by `of_rows(n)`; n rows `x_stride` bytes apart at x, and panels, of 32·`num_blocks`
    /// elements along K.
    pub unsafe fn one_by_four(
        &self,
        x: *const u8,
        x_stride: usize,
        panels: [*const u8; 4],
        ahead: usize,
        num_blocks: usize,
        out: &mut Product,
    ) {
        // SAFETY: reads what the caller guarantees, writes `out`.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "2:",
                ".irp i, 0,64,128,192,256,320,384,448,512,576,640,704,768,832,896,960",
                "prefetcht0 [{b0} + {ahead} + \\i]",
                "prefetcht0 [{b1} + {ahead} + \\i]",
                "prefetcht0 [{b2} + {ahead} + \\i]",
                "prefetcht0 [{b3} + {ahead} + \\i]",
                ".endr",
                "tileloadd tmm4, [{a} + {x_stride}]",
                "tileloadd tmm5, [{b0} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tileloadd tmm6, [{b1} + {line}]",
                "tdpbf16ps tmm1, tmm4, tmm6",
                "tileloadd tmm7, [{b2} + {line}]",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tileloadd tmm5, [{b3} + {line}]",
                "tdpbf16ps tmm3, tmm4, tmm5",
                "add {a}, 64",
                "add {b0}, 1024", "add {b1}, 1024", "add {b2}, 1024", "add {b3}, 1024",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {line}], tmm0",
                "tilestored [{c} + {line} + 1024], tmm1",
                "tilestored [{c} + {line} + 2048], tmm2",
                "tilestored [{c} + {line} + 3072], tmm3",
                a = inout(reg) x => _,
                b0 = inout(reg) panels[0] => _, b1 = inout(reg) panels[1] => _,
                b2 = inout(reg) panels[2] => _, b3 = inout(reg) panels[3] => _,
                n = inout(reg) num_blocks => _,
                x_stride = in(reg) x_stride, ahead = in(reg) ahead,
                line = in(reg) 64_usize, c = in(reg) out,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

impl Drop for Tiles {
    /// Leaves the thread without tile state, so that switching away from it stays cheap.
    fn drop(&mut self) {
        // SAFETY: the value exists, so the CPU has tiles.
        unsafe {
            asm!("tilerelease", options(nostack, nomem),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _);
        }
    }
}

/// Whether CPU and kernel have tiles of bf16; the first call asks the kernel for them, for all
/// threads of the process.
pub fn is_supported() -> bool {
    static SUPPORTED: OnceLock<bool> = OnceLock::new();
    *SUPPORTED.get_or_init(|| cpu_has_tiles() && kernel_grants_tiles())
}

/// Intel SDM vol. 2, CPUID leaf 7: amx-bf16 is EDX bit 22, amx-tile is EDX bit 24.
fn cpu_has_tiles() -> bool {
    const BITS: u32 = 1 << 22 | 1 << 24;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & BITS == BITS
}

/// `ARCH_REQ_XCOMP_PERM` of Linux: fails where the kernel or a virtual machine hides tile state.
#[cfg(target_os = "linux")]
fn kernel_grants_tiles() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: the call takes two numbers and touches no memory of ours.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        ) == 0
    }
}

#[cfg(not(target_os = "linux"))]
fn kernel_grants_tiles() -> bool {
    false
}
