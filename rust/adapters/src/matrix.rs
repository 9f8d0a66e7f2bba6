//! Weight matrices: decoded from a file's dtype, encoded in storage dtype.

use half::{bf16, f16};
use safetensors::Dtype;

use crate::bind::Source;
use crate::error::{Error, Result};
use crate::layout::{Panels, StorageDtype};

/// A row-major matrix of finite values.
#[derive(Debug)]
pub(crate) struct Matrix {
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
        let [_, columns] = source.info.shape[..] else {
            unreachable!("a bound tensor has two dimensions")
        };
        Ok(Self { columns, values })
    }

    /// Writes the matrix into `panels`, its first row as row `first_row` of theirs; bytes of other
    /// rows stay.
    pub(crate) fn write(&self, panels: Panels, first_row: usize, dst: &mut [u8]) {
        match panels.dtype {
            StorageDtype::Float32 => self.scatter(panels, first_row, dst, f32::to_le_bytes),
            StorageDtype::BFloat16 => {
                self.scatter(panels, first_row, dst, |v| bf16::from_f32(v).to_le_bytes());
            }
        }
    }

    /// Bytes are little-endian, as every supported machine is.
    fn scatter<const N: usize>(
        &self,
        panels: Panels,
        first_row: usize,
        dst: &mut [u8],
        encode: impl Fn(f32) -> [u8; N],
    ) {
        let elements = dst[..panels.nbytes()].as_chunks_mut().0;
        let pack = panels.dtype.pack();
        for (row, values) in self.values.chunks_exact(self.columns).enumerate() {
            let row = first_row + row;
            let start = panels.index(row, 0);
            let stride = if self.columns > pack {
                panels.index(row, pack) - start
            } else {
                0
            };
            for (index, values) in values.chunks(pack).enumerate() {
                let start = start + index * stride;
                for (slot, value) in elements[start..].iter_mut().zip(values) {
                    *slot = encode(*value);
                }
            }
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
