//! Weight matrices as a file holds them: checked, then written into panels in storage dtype.

use half::{bf16, f16};
use safetensors::Dtype;

use crate::error::{Error, Result};
use crate::layout::{Panels, StorageDtype};
use crate::weights::Source;

/// A row-major matrix whose values are finite in the storage dtype it was checked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Matrix<'a> {
    dtype: Dtype,
    columns: usize,
    bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// The bytes of `source`; every value must stay finite in `storage`.
    pub(crate) fn new(source: &Source, bytes: &'a [u8], storage: StorageDtype) -> Result<Self> {
        let dtype = source.info.dtype;
        check_finite(source, bytes, storage)?;
        let [_, columns] = source.info.shape[..] else {
            unreachable!("a bound tensor has two dimensions")
        };
        Ok(Self {
            dtype,
            columns,
            bytes,
        })
    }

    /// The values as they are stored, row by row.
    pub(crate) fn stored_values(&self, storage: StorageDtype) -> Vec<f32> {
        let mut bytes = Vec::new();
        store(self.dtype, self.bytes, storage, &mut bytes);
        let dtype = match storage {
            StorageDtype::Float32 => Dtype::F32,
            StorageDtype::BFloat16 => Dtype::BF16,
            StorageDtype::Float16 => Dtype::F16,
        };
        widened(dtype, &bytes)
    }

    /// The values as the file has them, row by row.
    pub(crate) fn values(&self) -> Vec<f32> {
        widened(self.dtype, self.bytes)
    }

    pub(crate) fn num_columns(&self) -> usize {
        self.columns
    }

    /// Writes the matrix into `panels` of `storage`, its first row as row `first_row` of theirs; bytes of
    /// other rows stay.
    pub(crate) fn write(
        &self,
        panels: Panels,
        storage: StorageDtype,
        first_row: usize,
        dst: &mut [u8],
    ) {
        use StorageDtype::{BFloat16, Float16, Float32};
        let place = (panels, first_row, dst);
        match (self.dtype, storage) {
            (Dtype::F32, Float32) => self.scatter::<4, 4, 1>(place, |bytes| bytes),
            (Dtype::F32, BFloat16) => {
                self.scatter::<4, 2, 2>(place, |bytes| round(f32::from_le_bytes(bytes)));
            }
            (Dtype::F16, Float32) => self.scatter::<2, 4, 1>(place, |bytes| {
                f16::from_le_bytes(bytes).to_f32().to_le_bytes()
            }),
            (Dtype::F16, BFloat16) => {
                self.scatter::<2, 2, 2>(place, |bytes| round(f16::from_le_bytes(bytes).to_f32()));
            }
            (Dtype::BF16, Float32) => self.scatter::<2, 4, 1>(place, |bytes| {
                bf16::from_le_bytes(bytes).to_f32().to_le_bytes()
            }),
            (Dtype::F32, Float16) => {
                self.scatter::<4, 2, 2>(place, |bytes| halve(f32::from_le_bytes(bytes)));
            }
            (Dtype::BF16, Float16) => {
                self.scatter::<2, 2, 2>(place, |bytes| halve(bf16::from_le_bytes(bytes).to_f32()));
            }
            (Dtype::BF16, BFloat16) | (Dtype::F16, Float16) => {
                self.scatter::<2, 2, 2>(place, |bytes| bytes);
            }
            (other, _) => unreachable!("a bound tensor is never {other}"),
        }
    }

    /// Elements of `FROM` bytes become elements of `TO` bytes, `PACK` neighbours of a row together.
    /// Bytes are little-endian, as every supported machine is.
    fn scatter<const FROM: usize, const TO: usize, const PACK: usize>(
        &self,
        (panels, first_row, dst): (Panels, usize, &mut [u8]),
        encode: impl Fn([u8; FROM]) -> [u8; TO],
    ) {
        let elements = dst[..panels.nbytes()].as_chunks_mut::<TO>().0;
        let values = self.bytes.as_chunks::<FROM>().0;
        for (row, values) in values.chunks_exact(self.columns).enumerate() {
            let row = first_row + row;
            let (packs, rest) = values.as_chunks::<PACK>();
            let start = panels.index(row, 0);
            let stride = panels.index(row, PACK) - start;
            for (values, dst) in packs.iter().zip(elements[start..].chunks_mut(stride)) {
                let pack = dst
                    .first_chunk_mut()
                    .expect("a pack of a row lies together");
                *pack = values.map(&encode);
            }
            if let [value] = rest {
                elements[start + packs.len() * stride] = encode(*value);
            }
        }
    }
}

/// Refuses a value that is not finite in the storage dtype.
pub(crate) fn check_finite(source: &Source, bytes: &[u8], storage: StorageDtype) -> Result<()> {
    match first_overflow(source.info.dtype, bytes, storage) {
        Some((index, value)) => Err(Error::NotFinite {
            tensor: source.name.clone(),
            index,
            value,
            dtype: storage.name(),
        }),
        None => Ok(()),
    }
}

/// The values of a vector, all finite.
pub(crate) fn finite_values(source: &Source, bytes: &[u8]) -> Result<Vec<f32>> {
    let values = widened(source.info.dtype, bytes);
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(Error::NotFinite {
            tensor: source.name.clone(),
            index,
            value: values[index],
            dtype: StorageDtype::Float32.name(),
        }),
        None => Ok(values),
    }
}

fn widened(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let halves = || bytes.as_chunks().0.iter().copied();
    match dtype {
        Dtype::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|value| f32::from_le_bytes(*value))
            .collect(),
        Dtype::F16 => halves().map(widen_f16).collect(),
        Dtype::BF16 => halves().map(widen_bf16).collect(),
        other => unreachable!("a bound tensor is never {other}"),
    }
}

/// Values of `dtype` in `bytes`, as `Matrix::write` stores them, in place of what `stored` held.
pub(crate) fn store(dtype: Dtype, bytes: &[u8], storage: StorageDtype, stored: &mut Vec<u8>) {
    use StorageDtype::{BFloat16, Float16, Float32};
    stored.clear();
    let wide = |value: f32| -> [u8; 4] { value.to_le_bytes() };
    match (dtype, storage) {
        (Dtype::F32, Float32) | (Dtype::F16, Float16) | (Dtype::BF16, BFloat16) => {
            stored.extend_from_slice(bytes);
        }
        (Dtype::F32, BFloat16) => convert(bytes, f32::from_le_bytes, round, stored),
        (Dtype::F32, Float16) => convert(bytes, f32::from_le_bytes, halve, stored),
        (Dtype::F16, Float32) => convert(bytes, widen_f16, wide, stored),
        (Dtype::F16, BFloat16) => convert(bytes, widen_f16, round, stored),
        (Dtype::BF16, Float32) => convert(bytes, widen_bf16, wide, stored),
        (Dtype::BF16, Float16) => convert(bytes, widen_bf16, halve, stored),
        (other, _) => unreachable!("a stored tensor is never {other}"),
    }
}

fn convert<const FROM: usize, const TO: usize>(
    bytes: &[u8],
    widen: impl Fn([u8; FROM]) -> f32,
    narrow: impl Fn(f32) -> [u8; TO],
    stored: &mut Vec<u8>,
) {
    let values = bytes.as_chunks::<FROM>().0;
    stored.extend(values.iter().flat_map(|value| narrow(widen(*value))));
}

fn widen_f16(bytes: [u8; 2]) -> f32 {
    f16::from_le_bytes(bytes).to_f32()
}

fn widen_bf16(bytes: [u8; 2]) -> f32 {
    bf16::from_le_bytes(bytes).to_f32()
}

/// To nearest, ties to even; the value is finite and stays so.
fn round(value: f32) -> [u8; 2] {
    let bits = value.to_bits();
    let rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    (rounded as u16).to_le_bytes()
}

/// As `round`, to f16.
fn halve(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

/// Index and value of the first element that is not finite in `storage`.
fn first_overflow(dtype: Dtype, bytes: &[u8], storage: StorageDtype) -> Option<(usize, f32)> {
    match dtype {
        Dtype::F32 => {
            let infinity = match storage {
                StorageDtype::Float32 => f32::INFINITY.to_bits(),
                StorageDtype::BFloat16 => BF16_OVERFLOW,
                StorageDtype::Float16 => F16_OVERFLOW,
            };
            let words = bytes.as_chunks().0;
            let is_large = |word: [u8; 4]| magnitude(u32::from_le_bytes(word)) >= infinity;
            find(words, is_large).map(|(index, word)| (index, f32::from_le_bytes(word)))
        }
        Dtype::F16 => {
            let infinity = f16::INFINITY.to_bits();
            let is_large = |word| u16::from_le_bytes(word) & 0x7fff >= infinity;
            let found = find(bytes.as_chunks().0, is_large);
            found.map(|(index, word)| (index, f16::from_le_bytes(word).to_f32()))
        }
        Dtype::BF16 => {
            let infinity = match storage {
                // The first bf16 that f16 rounds to infinity: 2^16.
                StorageDtype::Float16 => bf16::from_f32(65536.0).to_bits(),
                StorageDtype::Float32 | StorageDtype::BFloat16 => bf16::INFINITY.to_bits(),
            };
            let is_large = |word| u16::from_le_bytes(word) & 0x7fff >= infinity;
            let found = find(bytes.as_chunks().0, is_large);
            found.map(|(index, word)| (index, bf16::from_le_bytes(word).to_f32()))
        }
        other => unreachable!("a bound tensor is never {other}"),
    }
}

/// Bits of the smallest f32 that bf16 rounds to infinity: halfway past bf16's largest.
const BF16_OVERFLOW: u32 = 0x7f7f_8000;
/// As above for f16: 65520.
const F16_OVERFLOW: u32 = 0x477f_f000;

fn magnitude(bits: u32) -> u32 {
    bits & 0x7fff_ffff
}

/// The first word `is_large` holds for. All words are looked at without a branch, which compiles to
/// vector code; which one it was matters only to the error.
fn find<const N: usize>(
    words: &[[u8; N]],
    is_large: impl Fn([u8; N]) -> bool,
) -> Option<(usize, [u8; N])> {
    if !words.iter().fold(false, |any, word| any | is_large(*word)) {
        return None;
    }
    let index = words.iter().position(|word| is_large(*word))?;
    Some((index, words[index]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every exponent, with mantissas around the halves that bf16 rounds at, of both signs.
    fn floats() -> impl Iterator<Item = f32> {
        let mantissas = [
            0, 1, 0x7fff, 0x8000, 0x8001, 0xffff, 0x1_7fff, 0x1_8000, 0x7f_7fff, 0x7f_8000,
            0x7f_efff, 0x7f_f000, 0x7f_ffff,
        ];
        (0..512u32).flat_map(move |high| mantissas.map(|low| f32::from_bits(high << 23 | low)))
    }

    fn overflow(dtype: Dtype, bytes: &[u8], storage: StorageDtype) -> Option<usize> {
        first_overflow(dtype, bytes, storage).map(|(index, _)| index)
    }

    #[test]
    fn finite_floats_round_as_half_rounds_them() {
        for value in floats().filter(|value| bf16::from_f32(*value).is_finite()) {
            assert_eq!(
                round(value),
                bf16::from_f32(value).to_le_bytes(),
                "{value:e}"
            );
        }
    }

    #[test]
    fn a_float_is_refused_exactly_when_storage_can_not_hold_it() {
        for value in floats() {
            let bytes = [0.0_f32, value].map(f32::to_le_bytes).concat();
            let in_f32 = (!value.is_finite()).then_some(1);
            let in_bf16 = (!bf16::from_f32(value).is_finite()).then_some(1);
            let in_f16 = (!f16::from_f32(value).is_finite()).then_some(1);
            assert_eq!(
                overflow(Dtype::F32, &bytes, StorageDtype::Float32),
                in_f32,
                "{value:e}"
            );
            assert_eq!(
                overflow(Dtype::F32, &bytes, StorageDtype::Float16),
                in_f16,
                "{value:e}"
            );
            assert_eq!(
                overflow(Dtype::F32, &bytes, StorageDtype::BFloat16),
                in_bf16,
                "{value:e}"
            );
        }
    }

    #[test]
    fn a_bfloat16_is_refused_exactly_when_f16_can_not_hold_it() {
        for bits in 0..=u16::MAX {
            let bytes = [[0, 0], bits.to_le_bytes()].concat();
            let value = bf16::from_bits(bits).to_f32();
            let index = (!f16::from_f32(value).is_finite()).then_some(1);
            assert_eq!(
                overflow(Dtype::BF16, &bytes, StorageDtype::Float16),
                index,
                "{value:e}"
            );
        }
    }

    #[test]
    fn every_half_is_refused_exactly_when_it_is_not_finite() {
        for bits in 0..=u16::MAX {
            let bytes = [[0, 0], bits.to_le_bytes()].concat();
            for storage in [StorageDtype::Float32, StorageDtype::BFloat16] {
                let f16_index = (!f16::from_bits(bits).is_finite()).then_some(1);
                let bf16_index = (!bf16::from_bits(bits).is_finite()).then_some(1);
                assert_eq!(
                    overflow(Dtype::F16, &bytes, storage),
                    f16_index,
                    "{bits:#x}"
                );
                assert_eq!(
                    overflow(Dtype::BF16, &bytes, storage),
                    bf16_index,
                    "{bits:#x}"
                );
            }
        }
    }
}
