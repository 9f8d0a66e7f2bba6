//! One product of AMX tiles: 16 rows times 32 columns.

use std::arch::asm;

use crate::cpu::simd::amx::Tiles;

/// C [16][32] (+)= A · B; strides and steps are in elements.
pub(super) struct Product {
    /// bf16 [16][32·`num_steps`]
    pub a: *const u16,
    pub a_stride: usize,
    /// The tiles of each 16 columns, `b_step` apart.
    pub b: [*const u16; 2],
    pub b_step: usize,
    pub num_steps: usize,
    pub c: *mut f32,
    pub c_stride: usize,
}

impl Product {
    /// # Safety
    /// The operands are as long as they say.
    #[inline(always)]
    pub unsafe fn compute(&self, _tiles: &Tiles, from_zero: bool) {
        // SAFETY: the caller's contract; `_tiles` are configured with 16 rows each.
        unsafe {
            asm!(
                "test {from_zero:e}, {from_zero:e}",
                "jnz 2f",
                "tileloadd tmm0, [{c} + {c_stride}]",
                "tileloadd tmm1, [{c} + {c_stride} + 64]",
                "jmp 3f",
                "2:",
                "tilezero tmm0",
                "tilezero tmm1",
                "3:",
                "tileloadd tmm4, [{a} + {a_stride}]",
                "tileloadd tmm6, [{b0} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {line}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "add {a}, 64", "add {b0}, {b_step}", "add {b1}, {b_step}",
                "dec {n}",
                "jnz 3b",
                "tilestored [{c} + {c_stride}], tmm0",
                "tilestored [{c} + {c_stride} + 64], tmm1",
                from_zero = in(reg) u32::from(from_zero),
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
