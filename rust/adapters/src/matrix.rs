//! Weight matrices: decoded from a file's dtype, encoded in storage dtype.

use half::{bf16, f16};
use safetensors::Dtype;

use crate::bind::Source;
use crate::error::{Error, Result};
use crate::layout::StorageDtype;

/// A row-major matrix of finite values.
#[derive(Debug)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    /// Decodes the bytes of `source`; every value must stay finite in `storage`.
    pub(crate) fn decode(source: &Source, bytes: &[u8], storage: StorageDtype) -> Result<Self> {
        let values = decode_values(source.info.dtype, bytes);
        if let Some(index) = values
            .iter()
            .position(|value| !is_finite_in(*value, storage))
        {
            return Err(Error::NotFinite {
                tensor: source.name.clone(),
                index,
                value: values[index],
                dtype: storage.name(),
            });
        }
        let [rows, columns] = source.info.shape[..] else {
            unreachable!("a bound tensor has two dimensions")
        };
        Ok(Self {
            rows,
            columns,
            values,
        })
    }

    /// Writes the matrix row by row into `dst`, which it must fill.
    pub(crate) fn write(&self, dst: &mut [u8], dtype: StorageDtype) {
        encode(self.values.iter().copied(), dst, dtype);
    }

    /// Writes the transposed matrix, [columns, rows], into `dst`, which it must fill.
    pub(crate) fn write_transposed(&self, dst: &mut [u8], dtype: StorageDtype) {
        for (column, row) in dst.chunks_exact_mut(self.rows * dtype.size()).enumerate() {
            encode(
                self.values
                    .iter()
                    .skip(column)
                    .step_by(self.columns)
                    .copied(),
                row,
                dtype,
            );
        }
    }
}

fn decode_values(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        Dtype::F16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| f16::from_le_bytes(*b).to_f32())
            .collect(),
        Dtype::BF16 => bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| bf16::from_le_bytes(*b).to_f32())
            .collect(),
        other => unreachable!("a bound tensor is never {other}"),
    }
}

fn is_finite_in(value: f32, storage: StorageDtype) -> bool {
    match storage {
        StorageDtype::Float32 => value.is_finite(),
        StorageDtype::BFloat16 => bf16::from_f32(value).is_finite(),
    }
}

/// Rounds to nearest, ties to even. Bytes are little-endian, as every supported machine is.
fn encode(values: impl Iterator<Item = f32>, dst: &mut [u8], dtype: StorageDtype) {
    match dtype {
        StorageDtype::Float32 => {
            for (slot, value) in dst.as_chunks_mut().0.iter_mut().zip(values) {
                *slot = value.to_le_bytes();
            }
        }
        StorageDtype::BFloat16 => {
            for (slot, value) in dst.as_chunks_mut().0.iter_mut().zip(values) {
                *slot = bf16::from_f32(value).to_le_bytes();
            }
        }
    }
}
