//! Up to 16 rows and one key block of an online softmax, in AVX-512.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _CMP_LT_OQ, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEG_INF, _mm512_add_ps,
    _mm512_cmp_ps_mask, _mm512_cvtne2ps_pbh, _mm512_fmadd_ps, _mm512_fmsub_ps, _mm512_load_ps,
    _mm512_loadu_ps, _mm512_mask_loadu_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_add_ps,
    _mm512_reduce_max_ps, _mm512_reduce_ps, _mm512_scalef_ps, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_store_ps, _mm512_storeu_ps, _mm512_storeu_si512, _mm512_sub_ps,
};
use std::mem::transmute;

use super::tiles::KEY_BLOCK;
use crate::cpu::simd::LANES;
use crate::cpu::simd::amx::TILE;

const VECTORS: usize = KEY_BLOCK / LANES;

/// Running maxima of a tile's rows and, lane by lane, the sums of their exponentials.
#[repr(C, align(64))]
pub(super) struct RunningRows {
    max: [f32; TILE],
    sum: [[f32; LANES]; TILE],
}

impl RunningRows {
    pub const START: Self = Self {
        max: [f32::NEG_INFINITY; TILE],
        sum: [[0.0; LANES]; TILE],
    };

    #[target_feature(enable = "avx512f,avx512dq")]
    pub fn sum(&self, row: usize) -> f32 {
        // SAFETY: 16 lanes.
        _mm512_reduce_add_ps(unsafe { _mm512_load_ps(self.sum[row].as_ptr()) })
    }
}

/// The rows of a tile and what they see of a key block.
pub(super) struct Block<'a> {
    /// Keys that each row sees, of the whole context.
    pub num_visible: &'a [u32],
    /// First key of the block.
    pub first_key: usize,
    /// Of a score, as an exponent of two.
    pub scale: f32,
    /// [rows][`KEY_BLOCK`]; the first half of each row becomes its weights, in bf16.
    pub scores: *mut f32,
    /// [rows][`acc_len`]
    pub acc: *mut f32,
    pub acc_len: usize,
}

impl Block<'_> {
    /// weights = bf16(2^(scores·scale − max)), zero where a row doesn't see; running sums and
    /// accumulators follow the maxima.
    ///
    /// # Safety
    /// The parts are as long as they say; `acc_len` is a multiple of 16.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    pub unsafe fn softmax(&self, running: &mut RunningRows) {
        // SAFETY: rows below the number of rows, 16 lanes of the running state.
        unsafe {
            let shifts = self.raise_maxima(running);
            for (r, &num_visible) in self.num_visible.iter().enumerate() {
                let scores = self.row(r, num_visible as usize);
                let sum = self.softmax_row(r, scores, shifts.0[r]);
                let running = running.sum[r].as_mut_ptr();
                _mm512_store_ps(running, _mm512_add_ps(_mm512_load_ps(running), sum));
            }
        }
    }

    /// Takes the block into the running maxima and rescales what was summed below the old ones;
    /// returns maxima · scale.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512bf16")]
    unsafe fn raise_maxima(&self, running: &mut RunningRows) -> Lanes {
        let mut peaks = Lanes([f32::NEG_INFINITY; LANES]);
        let (mut factors, mut shifts) = (Lanes([0.0; LANES]), Lanes([0.0; LANES]));
        // SAFETY: rows below the number of rows, 16 lanes of the running state.
        unsafe {
            for (r, &num_visible) in self.num_visible.iter().enumerate() {
                let x = self.row(r, num_visible as usize);
                let mut peak = x[0];
                for i in 1..VECTORS {
                    peak = _mm512_max_ps(peak, x[i]);
                }
                peaks.0[r] = _mm512_reduce_max_ps(peak);
            }
            let scale = _mm512_set1_ps(self.scale);
            let old = _mm512_load_ps(running.max.as_ptr());
            let new = _mm512_max_ps(old, _mm512_load_ps(peaks.0.as_ptr()));
            let factor = exp2(_mm512_mul_ps(_mm512_sub_ps(old, new), scale));
            _mm512_store_ps(running.max.as_mut_ptr(), new);
            _mm512_store_ps(factors.0.as_mut_ptr(), factor);
            _mm512_store_ps(shifts.0.as_mut_ptr(), _mm512_mul_ps(new, scale));
            let mut raised = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(old, new);
            while raised != 0 {
                let r = raised.trailing_zeros() as usize;
                raised &= raised - 1;
                scale_row(running.sum[r].as_mut_ptr(), LANES, factors.0[r]);
                scale_row(self.acc.add(r * self.acc_len), self.acc_len, factors.0[r]);
            }
        }
        shifts
    }

    /// Scores of row `r`, −∞ where it doesn't see.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn row(&self, r: usize, num_visible: usize) -> [__m512; VECTORS] {
        let mut x = [_mm512_setzero_ps(); VECTORS];
        let num_visible = num_visible.saturating_sub(self.first_key);
        // SAFETY: row r holds `KEY_BLOCK` scores.
        unsafe {
            let scores = self.scores.add(r * KEY_BLOCK);
            if num_visible >= KEY_BLOCK {
                for i in 0..VECTORS {
                    x[i] = _mm512_loadu_ps(scores.add(i * LANES));
                }
            } else {
                let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
                let visible = (1_u64 << num_visible) - 1;
                for i in 0..VECTORS {
                    let lanes = (visible >> (i * LANES)) as u16;
                    x[i] = _mm512_mask_loadu_ps(hidden, lanes, scores.add(i * LANES));
                }
            }
        }
        x
    }

    /// Weights of row `r`; returns their sum, lane by lane.
    #[inline]
    #[target_feature(enable = "avx512f,avx512dq,avx512bf16")]
    unsafe fn softmax_row(&self, r: usize, mut x: [__m512; VECTORS], shift: f32) -> __m512 {
        let (scale, shift) = (_mm512_set1_ps(self.scale), _mm512_set1_ps(shift));
        for i in 0..VECTORS {
            x[i] = exp2(_mm512_fmsub_ps(x[i], scale, shift));
        }
        // SAFETY: row r holds `KEY_BLOCK` weights.
        unsafe {
            let weights = self.scores.add(r * KEY_BLOCK).cast::<u16>();
            for i in (0..VECTORS).step_by(2) {
                let pair = _mm512_cvtne2ps_pbh(x[i + 1], x[i]);
                let pair = transmute::<__m512bh, __m512i>(pair);
                _mm512_storeu_si512(weights.add(i * LANES).cast(), pair);
            }
        }
        let mut sum = x[0];
        for i in 1..VECTORS {
            sum = _mm512_add_ps(sum, x[i]);
        }
        sum
    }
}

/// A float per row.
#[repr(C, align(64))]
struct Lanes([f32; LANES]);

/// row [len] *= factor; `len` is a multiple of 16.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn scale_row(row: *mut f32, len: usize, factor: f32) {
    let factor = _mm512_set1_ps(factor);
    for i in (0..len).step_by(LANES) {
        // SAFETY: the row holds `len` floats.
        unsafe {
            let value = _mm512_loadu_ps(row.add(i));
            _mm512_storeu_ps(row.add(i), _mm512_mul_ps(value, factor));
        }
    }
}

/// 2ˣ within 3e-6 of its value: a minimax polynomial on x − ⌊x⌋; far below what bf16 rounds away.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn exp2(x: __m512) -> __m512 {
    let r = _mm512_reduce_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(x);
    let mut p = _mm512_set1_ps(0.013_534_167);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.052_011_46));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.241_442_75));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.693_003_8));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.000_002_6));
    _mm512_scalef_ps(p, x)
}
