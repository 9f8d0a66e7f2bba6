//! bf16 products in Intel AMX tiles: eight registers of 16 rows × 64 bytes.
//!
//! ```text
//! C [16 rows][16 columns] f32  +=  A [16 rows][32 k] bf16  ·  B [16 pairs of k][16 columns][2] bf16
//! ```
//! B is a stretch of a packed panel, A is x as it lies in memory. A product is a sum of terms: the dense
//! one, then those of adapters. It is one block of assembly, because the compiler does not know that
//! tiles hold values between two blocks. Tiles treat denormal numbers as zero.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::marker::PhantomData;
use std::mem::offset_of;
use std::sync::OnceLock;

mod row;

use loraserve_adapters::StorageDtype;

use super::Isa;
pub use row::{Next, Row};

/// Rows and columns of a tile of f32.
pub const TILE: usize = 16;
/// Elements along K of one tile of bf16.
pub const TILE_K: usize = 32;

/// The results of a product: 32 rows of two panels, or 16 rows of four.
#[repr(align(64))]
pub struct Product(pub [f32; 4 * TILE * TILE]);

impl Product {
    pub fn new() -> Self {
        Self([0.0; 4 * TILE * TILE])
    }
}

/// One A·B of a product, over 32·`num_blocks` elements along K.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Term {
    /// Row tiles of A; a null one takes no part.
    pub x: [*const u8; 2],
    /// Panels of B; only the first P are read.
    pub panels: [*const u8; 4],
    /// Bytes from row to row of A.
    pub x_stride: usize,
    /// Bytes from pair to pair of K in a panel: 64, or 32 for a panel of 8 columns.
    panel_stride: usize,
    block_nbytes: usize,
    /// How many bytes after the weights in use are prefetched; 0 prefetches nothing.
    pub prefetch_distance: usize,
    pub num_blocks: usize,
}

impl Term {
    /// `panel_width`: columns of the panels, 16 or 8.
    pub fn new(
        x: [*const u8; 2],
        x_stride: usize,
        panels: [*const u8; 4],
        panel_width: usize,
        num_blocks: usize,
    ) -> Self {
        Self {
            x,
            panels,
            x_stride,
            panel_stride: 4 * panel_width,
            block_nbytes: 4 * panel_width * TILE,
            prefetch_distance: 0,
            num_blocks,
        }
    }
}

const A0: usize = offset_of!(Term, x);
const B0: usize = offset_of!(Term, panels);
const A_STRIDE: usize = offset_of!(Term, x_stride);
const B_STRIDE: usize = offset_of!(Term, panel_stride);
const BLOCK: usize = offset_of!(Term, block_nbytes);
const DISTANCE: usize = offset_of!(Term, prefetch_distance);
const NUM_BLOCKS: usize = offset_of!(Term, num_blocks);

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
    /// Tiles for `two_by`.
    ///
    /// # Safety
    /// `is_supported` returned true.
    pub unsafe fn full() -> Self {
        // SAFETY: the caller's contract.
        unsafe { Self::configure([TILE as u8; 8], [64; 8]) }
    }

    /// Tiles for `one_by` of `num_rows ≤ 16` rows.
    ///
    /// # Safety
    /// `is_supported` returned true.
    pub unsafe fn of_rows(num_rows: usize) -> Self {
        // SAFETY: the caller's contract.
        unsafe { Self::of_rows_and_k(num_rows, TILE_K) }
    }

    /// Tiles for `add` of `num_rows ≤ 16` rows and one block of `k ≤ 32` elements.
    ///
    /// # Safety
    /// `is_supported` returned true.
    pub unsafe fn of_rows_and_k(num_rows: usize, k: usize) -> Self {
        let (rows, pairs) = (num_rows as u8, (k / 2) as u8);
        let mut row_nbytes = [64; 8];
        row_nbytes[4] = 2 * k as u16;
        // SAFETY: the caller's contract.
        unsafe {
            Self::configure(
                [rows, rows, rows, rows, rows, pairs, pairs, pairs],
                row_nbytes,
            )
        }
    }

    unsafe fn configure(rows: [u8; 8], row_nbytes: [u16; 8]) -> Self {
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_nbytes: [0; 16],
            num_rows: [0; 16],
        };
        config.row_nbytes[..8].copy_from_slice(&row_nbytes);
        config.num_rows[..8].copy_from_slice(&rows);
        // SAFETY: the CPU and the kernel allow tiles; the operand is a valid palette.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _);
        }
        Self(PhantomData)
    }

    /// Two row tiles times P ≤ 2 panels: rows of `x[0]` to `c[0]`, rows of `x[1]` to `c[1]`, the
    /// panels' columns side by side, rows `c_stride` bytes apart. What is prefetched goes to L2.
    ///
    /// # Safety
    /// Made by `full`; each term has 16 readable rows at each x that is not null, and P panels; 16
    /// rows are writable at each c.
    pub unsafe fn two_by<const P: usize>(&self, terms: &[Term], c: [*mut f32; 2], c_stride: usize) {
        debug_assert!((1..=2).contains(&P) && !terms.is_empty());
        // SAFETY: reads what the caller guarantees, writes `c`.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "2:",
                "mov {a0}, [{term} + {A0}]", "mov {a1}, [{term} + {A0} + 8]",
                "mov {b0}, [{term} + {B0}]", "mov {b1}, [{term} + {B0} + 8]",
                "mov {a_stride}, [{term} + {A_STRIDE}]", "mov {b_stride}, [{term} + {B_STRIDE}]",
                "mov {distance}, [{term} + {DISTANCE}]", "mov {n}, [{term} + {NUM_BLOCKS}]",
                "3:",
                "tileloaddt1 tmm6, [{b0} + {b_stride}]",
                ".if {P} > 1",
                "tileloaddt1 tmm7, [{b1} + {b_stride}]",
                ".endif",
                "test {a0}, {a0}",
                "jz 4f",
                "tileloadd tmm4, [{a0} + {a_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                ".if {P} > 1",
                "tdpbf16ps tmm1, tmm4, tmm7",
                ".endif",
                "add {a0}, 64",
                "4:",
                "test {a1}, {a1}",
                "jz 5f",
                "tileloadd tmm5, [{a1} + {a_stride}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                ".if {P} > 1",
                "tdpbf16ps tmm3, tmm5, tmm7",
                ".endif",
                "add {a1}, 64",
                "5:",
                "test {distance}, {distance}",
                "jz 6f",
                ".irp i, 0,64,128,192,256,320,384,448,512,576,640,704,768,832,896,960",
                "prefetcht1 [{b0} + {distance} + \\i]",
                ".if {P} > 1",
                "prefetcht1 [{b1} + {distance} + \\i]",
                ".endif",
                ".endr",
                "6:",
                "add {b0}, [{term} + {BLOCK}]", "add {b1}, [{term} + {BLOCK}]",
                "dec {n}",
                "jnz 3b",
                "add {term}, {SIZE}",
                "dec {count}",
                "jnz 2b",
                "tilestored [{c0} + {c_stride}], tmm0",
                "tilestored [{c1} + {c_stride}], tmm2",
                ".if {P} > 1",
                "tilestored [{c0} + {c_stride} + 64], tmm1",
                "tilestored [{c1} + {c_stride} + 64], tmm3",
                ".endif",
                term = inout(reg) terms.as_ptr() => _, count = inout(reg) terms.len() => _,
                c0 = in(reg) c[0], c1 = in(reg) c[1], c_stride = in(reg) c_stride,
                a0 = out(reg) _, a1 = out(reg) _, b0 = out(reg) _, b1 = out(reg) _,
                n = out(reg) _, a_stride = out(reg) _, b_stride = out(reg) _, distance = out(reg) _,
                A0 = const A0, B0 = const B0, A_STRIDE = const A_STRIDE, B_STRIDE = const B_STRIDE,
                DISTANCE = const DISTANCE, NUM_BLOCKS = const NUM_BLOCKS, BLOCK = const BLOCK,
                SIZE = const size_of::<Term>(), P = const P,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// One row tile, `x[0]`, times P ≤ 4 panels: to `c`, the panels' columns side by side, rows
    /// `c_stride` bytes apart.
    ///
    /// # Safety
    /// Made by `of_rows(n)`; each term has n readable rows at `x[0]`, and P panels; n rows are writable
    /// at `c`.
    pub unsafe fn one_by<const P: usize>(&self, terms: &[Term], c: *mut f32, c_stride: usize) {
        debug_assert!((1..=4).contains(&P) && !terms.is_empty());
        // SAFETY: reads what the caller guarantees, writes `c`.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "2:",
                "mov {a}, [{term} + {A0}]",
                "mov {b0}, [{term} + {B0}]", "mov {b1}, [{term} + {B0} + 8]",
                "mov {b2}, [{term} + {B0} + 16]", "mov {b3}, [{term} + {B0} + 24]",
                "mov {a_stride}, [{term} + {A_STRIDE}]", "mov {b_stride}, [{term} + {B_STRIDE}]",
                "mov {distance}, [{term} + {DISTANCE}]", "mov {n}, [{term} + {NUM_BLOCKS}]",
                "3:",
                "test {distance}, {distance}",
                "jz 4f",
                ".irp i, 0,64,128,192,256,320,384,448,512,576,640,704,768,832,896,960",
                "prefetcht0 [{b0} + {distance} + \\i]",
                ".if {P} > 1",
                "prefetcht0 [{b1} + {distance} + \\i]",
                ".endif",
                ".if {P} > 2",
                "prefetcht0 [{b2} + {distance} + \\i]",
                ".endif",
                ".if {P} > 3",
                "prefetcht0 [{b3} + {distance} + \\i]",
                ".endif",
                ".endr",
                "4:",
                "tileloadd tmm4, [{a} + {a_stride}]",
                "tileloaddt1 tmm5, [{b0} + {b_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                ".if {P} > 1",
                "tileloaddt1 tmm6, [{b1} + {b_stride}]",
                "tdpbf16ps tmm1, tmm4, tmm6",
                ".endif",
                ".if {P} > 2",
                "tileloaddt1 tmm7, [{b2} + {b_stride}]",
                "tdpbf16ps tmm2, tmm4, tmm7",
                ".endif",
                ".if {P} > 3",
                "tileloaddt1 tmm5, [{b3} + {b_stride}]",
                "tdpbf16ps tmm3, tmm4, tmm5",
                ".endif",
                "add {a}, 64",
                "add {b0}, [{term} + {BLOCK}]", "add {b1}, [{term} + {BLOCK}]",
                "add {b2}, [{term} + {BLOCK}]", "add {b3}, [{term} + {BLOCK}]",
                "dec {n}",
                "jnz 3b",
                "add {term}, {SIZE}",
                "dec {count}",
                "jnz 2b",
                "tilestored [{c} + {c_stride}], tmm0",
                ".if {P} > 1", "tilestored [{c} + {c_stride} + 64], tmm1", ".endif",
                ".if {P} > 2", "tilestored [{c} + {c_stride} + 128], tmm2", ".endif",
                ".if {P} > 3", "tilestored [{c} + {c_stride} + 192], tmm3", ".endif",
                term = inout(reg) terms.as_ptr() => _, count = inout(reg) terms.len() => _,
                c = in(reg) c, c_stride = in(reg) c_stride,
                a = out(reg) _, b0 = out(reg) _, b1 = out(reg) _, b2 = out(reg) _, b3 = out(reg) _,
                n = out(reg) _, a_stride = out(reg) _, b_stride = out(reg) _, distance = out(reg) _,
                A0 = const A0, B0 = const B0, A_STRIDE = const A_STRIDE, B_STRIDE = const B_STRIDE,
                DISTANCE = const DISTANCE, NUM_BLOCKS = const NUM_BLOCKS, BLOCK = const BLOCK,
                SIZE = const size_of::<Term>(), P = const P,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// c += x · B of one block along K: the panels' columns side by side, rows `c_stride` bytes apart.
    /// Panels lie `panel_nbytes` apart; `next` is fetched at the pace at which they are read.
    ///
    /// # Safety
    /// Made by `of_rows_and_k(n, k)`; n rows of k elements are readable at `x`, `x_stride` bytes apart,
    /// `num_panels ≥ 1` panels of k / 2 pairs at `panels`; n rows are writable at `c`; `next` need not
    /// be valid.
    #[allow(clippy::too_many_arguments)] // a BLAS-like product has these
    pub unsafe fn add(
        &self,
        x: *const u8,
        x_stride: usize,
        panels: *const u8,
        panel_nbytes: usize,
        num_panels: usize,
        c: *mut f32,
        c_stride: usize,
        next: Next,
    ) {
        debug_assert!(num_panels > 0);
        let fetch_end = next.address.wrapping_add(next.nbytes);
        // SAFETY: reads what the caller guarantees, writes `c`.
        unsafe {
            asm!(
                "tileloadd tmm4, [{x} + {x_stride}]",
                "2:",
                "tileloaddt1 tmm5, [{panels} + {b_stride}]",
                "tileloadd tmm0, [{c} + {c_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tilestored [{c} + {c_stride}], tmm0",
                "cmp {next}, {fetch_end}",
                "jae 4f",
                "lea {line}, [{next} + {panel_nbytes}]",
                "3:",
                "prefetcht1 [{next}]",
                "add {next}, 64",
                "cmp {next}, {line}",
                "jb 3b",
                "4:",
                "add {panels}, {panel_nbytes}", "add {c}, 64",
                "dec {num_panels}",
                "jnz 2b",
                x = in(reg) x, x_stride = in(reg) x_stride,
                panels = inout(reg) panels => _, b_stride = in(reg) 64_usize,
                panel_nbytes = in(reg) panel_nbytes, num_panels = inout(reg) num_panels => _,
                c = inout(reg) c => _, c_stride = in(reg) c_stride, line = out(reg) _,
                next = inout(reg) next.address => _, fetch_end = in(reg) fetch_end,
                out("tmm0") _, out("tmm4") _, out("tmm5") _,
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

/// Whether a product of `dtype` along `k` runs in tiles; whole ones only.
pub fn in_tiles(isa: Isa, dtype: StorageDtype, k: usize) -> bool {
    isa == Isa::Amx && dtype == StorageDtype::BFloat16 && k.is_multiple_of(TILE_K)
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
