//! Quantised weights from the blocks of ggml's types, as .gguf files hold them.
//!
//! A row is a run of blocks of 32 or 256 columns. A block is one or two float16 scales, the integers that scale its
//! groups, and the low and high bits of its values, in the order that each function below gives. What a value stands
//! for is exactly what ggml computes in float32.

use half::f16;

use super::fill::{RowMut, filled};
use super::{QuantBits, QuantFormat, QuantizedWeight};
use crate::KernelError;
use crate::error::{check_below, check_length, check_product};

/// The types that are kept quantised, by their number in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(non_camel_case_types, reason = "ggml's own names")]
pub enum GgmlType {
    Q4_0 = 2,
    Q4_1 = 3,
    Q5_0 = 6,
    Q5_1 = 7,
    Q8_0 = 8,
    Q2_K = 10,
    Q3_K = 11,
    Q4_K = 12,
    Q5_K = 13,
    Q6_K = 14,
    IQ4_NL = 20,
    IQ4_XS = 23,
}

use GgmlType::{IQ4_NL, IQ4_XS, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};

const ALL: [GgmlType; 12] = [
    Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS,
];

/// What the four bits of the IQ4 types stand for.
const IQ4_VALUES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

impl GgmlType {
    /// The type with this number, if it is one of these.
    pub fn from_number(number: u32) -> Option<Self> {
        ALL.into_iter().find(|&kind| kind as u32 == number)
    }

    pub fn format(self) -> QuantFormat {
        let (bits, group, has_mins) = match self {
            Q4_0 => (QuantBits::Four, 32, false),
            Q4_1 | Q4_K => (QuantBits::Four, 32, true),
            Q2_K => (QuantBits::Four, 16, true),
            Q8_0 | Q5_0 | IQ4_NL | IQ4_XS => (QuantBits::Eight, 32, false),
            Q5_1 | Q5_K => (QuantBits::Eight, 32, true),
            Q6_K | Q3_K => (QuantBits::Eight, 16, false),
        };
        QuantFormat {
            bits,
            group,
            has_mins,
        }
    }

    /// Columns and bytes of a block.
    fn block(self) -> (usize, usize) {
        match self {
            Q4_0 | IQ4_NL => (32, 2 + 16),
            Q4_1 => (32, 2 + 2 + 16),
            Q5_0 => (32, 2 + 4 + 16),
            Q5_1 => (32, 2 + 2 + 4 + 16),
            Q8_0 => (32, 2 + 32),
            Q2_K => (256, 16 + 64 + 2 + 2),
            Q3_K => (256, 32 + 64 + 12 + 2),
            Q4_K => (256, 2 + 2 + 12 + 128),
            Q5_K => (256, 2 + 2 + 12 + 32 + 128),
            Q6_K => (256, 128 + 64 + 16 + 2),
            IQ4_XS => (256, 2 + 2 + 4 + 128),
        }
    }

    fn decode(self) -> fn(&[u8], &mut RowMut<'_>) {
        match self {
            Q4_0 => q4_0,
            Q4_1 => q4_1,
            Q5_0 => q5_0,
            Q5_1 => q5_1,
            Q8_0 => q8_0,
            Q2_K => q2_k,
            Q3_K => q3_k,
            Q4_K => q4_k,
            Q5_K => q5_k,
            Q6_K => q6_k,
            IQ4_NL => iq4_nl,
            IQ4_XS => iq4_xs,
        }
    }
}

/// The weight [N, K] that `blocks`, rows one after another, hold. Row n of it is row `order[n]` of them; all N stand
/// where they are without an order.
///
/// Refuses columns that are no whole blocks, bytes that are not those of N rows, an order that is not of N rows, and
/// scales that are not finite.
pub fn from_ggml(
    kind: GgmlType,
    blocks: &[u8],
    in_features: usize,
    out_features: usize,
    order: Option<&[usize]>,
) -> Result<QuantizedWeight, KernelError> {
    let (block_len, block_nbytes) = kind.block();
    if in_features == 0 || !in_features.is_multiple_of(block_len) {
        let message = format!(
            "{kind:?} weight has {in_features} columns, expected whole blocks of {block_len}"
        );
        return Err(KernelError::Invalid(message));
    }
    let row_nbytes = in_features / block_len * block_nbytes;
    let nbytes = check_product("weight", &[row_nbytes, out_features])?;
    check_length("blocks", blocks.len(), nbytes)?;
    if let Some(order) = order {
        check_length("order of rows", order.len(), out_features)?;
        for &row in order {
            check_below("row", row as i64, out_features as i64)?;
        }
    }
    let format = kind.format();
    let decode = kind.decode();
    let groups = block_len / format.group;
    filled(format, in_features, out_features, |n, row| {
        let source = order.map_or(n, |order| order[n]);
        let blocks = &blocks[source * row_nbytes..][..row_nbytes];
        let mut mins = row.mins;
        let parts = row
            .quants
            .chunks_exact_mut(block_len)
            .zip(row.scales.chunks_exact_mut(groups));
        for (block, (quants, scales)) in blocks.chunks_exact(block_nbytes).zip(parts) {
            let (of_block, rest) = mins.split_at_mut(groups.min(mins.len()));
            mins = rest;
            let mut row = RowMut {
                quants,
                scales,
                mins: of_block,
            };
            decode(block, &mut row);
        }
        Ok(())
    })
}

fn scale(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Low halves of the bytes, then the high halves.
fn nibbles(bytes: &[u8], quants: &mut [u8]) {
    let (low, high) = quants.split_at_mut(bytes.len());
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

/// Two bits of each value: of the first `bytes.len()` in the lowest of each byte, and so on.
fn pairs(bytes: &[u8], quants: &mut [u8]) {
    for (shift, quants) in quants.chunks_exact_mut(bytes.len()).enumerate() {
        for (q, byte) in quants.iter_mut().zip(bytes) {
            *q = (byte >> (2 * shift)) & 3;
        }
    }
}

/// Adds to each value, as an i8.
fn shift_by(quants: &mut [u8], offset: i8) {
    for q in quants {
        *q = q.wrapping_add_signed(offset);
    }
}

/// d:f16 values:[u8; 16]
fn q4_0(block: &[u8], row: &mut RowMut<'_>) {
    row.scales[0] = scale(block);
    nibbles(&block[2..], row.quants);
}

/// d:f16 m:f16 values:[u8; 16]
fn q4_1(block: &[u8], row: &mut RowMut<'_>) {
    row.scales[0] = scale(block);
    row.mins[0] = scale(&block[2..]);
    nibbles(&block[4..], row.quants);
}

/// fifths:u32 values:[u8; 16]; the fifth bit of value i is bit i.
fn five_bits(bytes: &[u8], quants: &mut [u8]) {
    nibbles(&bytes[4..], quants);
    for (quants, byte) in quants.chunks_exact_mut(8).zip(bytes) {
        for (bit, q) in quants.iter_mut().enumerate() {
            *q |= (byte >> bit & 1) << 4;
        }
    }
}

/// d:f16, then `five_bits`
fn q5_0(block: &[u8], row: &mut RowMut<'_>) {
    row.scales[0] = scale(block);
    five_bits(&block[2..], row.quants);
    shift_by(row.quants, -16);
}

/// d:f16 m:f16, then `five_bits`
fn q5_1(block: &[u8], row: &mut RowMut<'_>) {
    row.scales[0] = scale(block);
    row.mins[0] = scale(&block[2..]);
    five_bits(&block[4..], row.quants);
}

/// d:f16 values:[i8; 32]
fn q8_0(block: &[u8], row: &mut RowMut<'_>) {
    row.scales[0] = scale(block);
    row.quants.copy_from_slice(&block[2..]);
}

/// scales:[u8; 16] values:[u8; 64] d:f16 dmin:f16; a byte of scales is (scale, min) of a group of 16.
fn q2_k(block: &[u8], row: &mut RowMut<'_>) {
    let (d, dmin) = (scale(&block[80..]), scale(&block[82..]));
    for (group, byte) in block[..16].iter().enumerate() {
        row.scales[group] = d * f32::from(byte & 15);
        row.mins[group] = -(dmin * f32::from(byte >> 4));
    }
    for (quants, bytes) in row
        .quants
        .chunks_exact_mut(128)
        .zip(block[16..80].chunks_exact(32))
    {
        pairs(bytes, quants);
    }
}

/// thirds:[u8; 32] values:[u8; 64] scales:[u8; 12] d:f16; a value is its two bits less 4 where its third is not set.
///
/// Scales have 6 bits, less 32: the low four in the first 8 bytes, the low halves first, the high two in the last 4.
fn q3_k(block: &[u8], row: &mut RowMut<'_>) {
    let (thirds, scales, d) = (&block[..32], &block[96..108], scale(&block[108..]));
    for (group, of_group) in row.scales.iter_mut().enumerate() {
        let low = scales[group % 8] >> (group / 8 * 4) & 15;
        let high = scales[8 + group % 4] >> (group / 4 * 2) & 3;
        *of_group = d * f32::from((low | high << 4).cast_signed() - 32);
    }
    for (quants, bytes) in row
        .quants
        .chunks_exact_mut(128)
        .zip(block[32..96].chunks_exact(32))
    {
        pairs(bytes, quants);
    }
    for (bit, quants) in row.quants.chunks_exact_mut(32).enumerate() {
        for (q, byte) in quants.iter_mut().zip(thirds) {
            *q = q.wrapping_sub((!byte >> bit & 1) << 2);
        }
    }
}

/// d:f16 dmin:f16 scales:[u8; 12], scales and minimums of 8 groups in 6 bits.
///
/// Those of the first four groups are the low bits of bytes 0–3 and 4–7, whose high two bits go above the halves of
/// bytes 8–11, which are of the last four.
fn k_scales(block: &[u8], scales_out: &mut [f32], mins_out: &mut [f32]) {
    let (d, dmin, bytes) = (scale(block), scale(&block[2..]), &block[4..16]);
    for group in 0..8 {
        let (of_scale, of_min) = if group < 4 {
            (bytes[group] & 63, bytes[group + 4] & 63)
        } else {
            let (first, second, last) = (bytes[group - 4], bytes[group], bytes[group + 4]);
            (last & 15 | first >> 6 << 4, last >> 4 | second >> 6 << 4)
        };
        scales_out[group] = d * f32::from(of_scale);
        mins_out[group] = -(dmin * f32::from(of_min));
    }
}

/// `k_scales` values:[u8; 128], of two groups in 32 bytes.
fn q4_k(block: &[u8], row: &mut RowMut<'_>) {
    k_scales(block, row.scales, row.mins);
    for (quants, bytes) in row
        .quants
        .chunks_exact_mut(64)
        .zip(block[16..].chunks_exact(32))
    {
        nibbles(bytes, quants);
    }
}

/// `k_scales` fifths:[u8; 32] values:[u8; 128], of two groups in 32 bytes; group i has the fifth bits i.
fn q5_k(block: &[u8], row: &mut RowMut<'_>) {
    k_scales(block, row.scales, row.mins);
    let fifths = &block[16..48];
    for (quants, bytes) in row
        .quants
        .chunks_exact_mut(64)
        .zip(block[48..].chunks_exact(32))
    {
        nibbles(bytes, quants);
    }
    for (group, quants) in row.quants.chunks_exact_mut(32).enumerate() {
        for (q, byte) in quants.iter_mut().zip(fifths) {
            *q |= (byte >> group & 1) << 4;
        }
    }
}

/// lows:[u8; 128] highs:[u8; 64] scales:[i8; 16] d:f16; 128 values have 64 bytes of lows and 32 of highs.
fn q6_k(block: &[u8], row: &mut RowMut<'_>) {
    let d = scale(&block[208..]);
    for (of_group, byte) in row.scales.iter_mut().zip(&block[192..208]) {
        *of_group = d * f32::from(byte.cast_signed());
    }
    let halves = block[..128]
        .chunks_exact(64)
        .zip(block[128..192].chunks_exact(32));
    for (quants, (lows, highs)) in row.quants.chunks_exact_mut(128).zip(halves) {
        nibbles(lows, quants);
        for (shift, quants) in quants.chunks_exact_mut(32).enumerate() {
            for (q, byte) in quants.iter_mut().zip(highs) {
                *q |= (byte >> (2 * shift) & 3) << 4;
            }
        }
    }
    shift_by(row.quants, -32);
}

fn from_codebook(quants: &mut [u8]) {
    for q in quants {
        *q = IQ4_VALUES[usize::from(*q & 15)].cast_unsigned();
    }
}

/// d:f16 values:[u8; 16]
fn iq4_nl(block: &[u8], row: &mut RowMut<'_>) {
    q4_0(block, row);
    from_codebook(row.quants);
}

/// d:f16 highs:u16 lows:[u8; 4] values:[u8; 128]; scales of 8 groups in 6 bits, less 32.
fn iq4_xs(block: &[u8], row: &mut RowMut<'_>) {
    let (d, highs) = (scale(block), u16::from_le_bytes([block[2], block[3]]));
    for (group, of_group) in row.scales.iter_mut().enumerate() {
        let low = block[4 + group / 2] >> (group % 2 * 4) & 15;
        let high = (highs >> (2 * group) & 3) as u8;
        *of_group = d * f32::from((low | high << 4).cast_signed() - 32);
    }
    for (quants, bytes) in row
        .quants
        .chunks_exact_mut(32)
        .zip(block[8..].chunks_exact(16))
    {
        nibbles(bytes, quants);
    }
    from_codebook(row.quants);
}

#[cfg(test)]
mod tests;
