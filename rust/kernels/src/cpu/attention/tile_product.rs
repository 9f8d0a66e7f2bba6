//! One product of AMX tiles: up to 16 rows times 32 columns.

use std::arch::asm;

use crate::cpu::simd::amx::Tiles;

/// A · B of as many rows as the tiles are made for; strides and steps are in elements.
#[derive(Clone, Copy)]
pub(super) struct Product {
    /// bf16 [rows][32·`num_steps`]
    pub a: *const u16,
    pub a_stride: usize,
    /// The tiles of each 16 columns, `b_step` apart.
    pub b: [*const u16; 2],
    pub b_step: usize,
    pub num_steps: usize,
    /// [rows][32]
    pub c: *mut f32,
    pub c_stride: usize,
}

impl Product {
    /// C = A · B; at each step a KiB from `prefetch` on is prefetched, unless it is null.
    ///
    /// # Safety
    /// The operands are as long as they say; the tiles were made by `of_rows`.
    #[inline(always)]
    pub unsafe fn compute(&self, _tiles: &Tiles, prefetch: *const u8) {
        // SAFETY: the caller's contract.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm4, [{a} + {a_stride}]",
                "tileloadd tmm6, [{b0} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {line}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "test {prefetch}, {prefetch}",
                "jz 3f",
                ".irp i, 0,64,128,192,256,320,384,448,512,576,640,704,768,832,896,960",
                "prefetcht1 [{prefetch} + \\i]",
                ".endr",
                "add {prefetch}, 1024",
                "3:",
                "add {a}, 64", "add {b0}, {b_step}", "add {b1}, {b_step}",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {c_stride}], tmm0",
                "tilestored [{c} + {c_stride} + 64], tmm1",
                a = inout(reg) self.a => _, a_stride = in(reg) 2 * self.a_stride,
                b0 = inout(reg) self.b[0] => _, b1 = inout(reg) self.b[1] => _,
                b_step = in(reg) 2 * self.b_step, n = inout(reg) self.num_steps => _,
                prefetch = inout(reg) prefetch => _,
                c = in(reg) self.c, c_stride = in(reg) 4 * self.c_stride,
                line = in(reg) 64_usize,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    /// C += A · B.
    ///
    /// # Safety
    /// The operands are as long as they say; the tiles were made by `of_rows`.
    #[inline(always)]
    pub unsafe fn accumulate(&self, _tiles: &Tiles) {
        // SAFETY: the caller's contract.
        unsafe {
            asm!(
                "tileloadd tmm0, [{c} + {c_stride}]",
                "tileloadd tmm1, [{c} + {c_stride} + 64]",
                "2:",
                "tileloadd tmm4, [{a} + {a_stride}]",
                "tileloadd tmm6, [{b0} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {line}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, 64", "add {b0}, {b_step}", "add {b1}, {b_step}",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {c_stride}], tmm0",
                "tilestored [{c} + {c_stride} + 64], tmm1",
                a = inout(reg) self.a => _, a_stride = in(reg) 2 * self.a_stride,
                b0 = inout(reg) self.b[0] => _, b1 = inout(reg) self.b[1] => _,
                b_step = in(reg) 2 * self.b_step, n = inout(reg) self.num_steps => _,
                c = in(reg) self.c, c_stride = in(reg) 4 * self.c_stride,
                line = in(reg) 64_usize,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}
