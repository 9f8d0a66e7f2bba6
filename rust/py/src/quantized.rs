//! Quantised weights, for Python. It hands over addresses of contiguous arrays, which it keeps alive and leaves alone
//! during a call, and checks their dtypes and lengths before.

use std::slice;

use half::{bf16, f16};
use loraserve_adapters::StorageDtype;
use loraserve_kernels::KernelError;
use loraserve_kernels::quantized as kernels;
use loraserve_kernels::quantized::ggml::{self, GgmlType};
use loraserve_kernels::quantized::make;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::of_kernel;

/// A weight [N, K] as scales times small integers, with minimums or without.
#[pyclass(frozen, module = "loraserve._core")]
pub struct QuantizedWeight {
    pub inner: kernels::QuantizedWeight,
}

/// The array of `len` elements at `address`.
///
/// # Safety
/// See the file's contract.
unsafe fn array<'a, T>(address: usize, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller guarantees a live array of this type and length.
    unsafe { slice::from_raw_parts(address as *const T, len) }
}

/// As `array`, to be written.
///
/// # Safety
/// See the file's contract.
unsafe fn array_mut<'a, T>(address: usize, len: usize) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller guarantees a live array of this type and length that nothing else reads.
    unsafe { slice::from_raw_parts_mut(address as *mut T, len) }
}

fn bits_of(bits: u8) -> PyResult<kernels::QuantBits> {
    match bits {
        4 => Ok(kernels::QuantBits::Four),
        8 => Ok(kernels::QuantBits::Eight),
        _ => Err(PyValueError::new_err(format!(
            "bits is {bits}, expected 4 or 8"
        ))),
    }
}

fn number_of(bits: kernels::QuantBits) -> u8 {
    match bits {
        kernels::QuantBits::Four => 4,
        kernels::QuantBits::Eight => 8,
    }
}

/// Each of the scales [N, K / group] as often as groups of `small` columns are in one of `group`.
fn repeated(scales: &[f32], group: usize, small: usize) -> Vec<f32> {
    let repeat = |&scale| std::iter::repeat_n(scale, group / small);
    scales.iter().flat_map(repeat).collect()
}

#[pymethods]
impl QuantizedWeight {
    /// `nbytes` at `blocks_ptr` are rows of blocks.
    #[staticmethod]
    #[pyo3(signature = (ggml_type, blocks_ptr, nbytes, in_features, out_features, order=None))]
    #[expect(clippy::needless_pass_by_value, reason = "what Python hands over")]
    fn from_ggml(
        py: Python<'_>,
        ggml_type: u32,
        blocks_ptr: usize,
        nbytes: usize,
        in_features: usize,
        out_features: usize,
        order: Option<Vec<usize>>,
    ) -> PyResult<Self> {
        let kind = GgmlType::from_number(ggml_type).ok_or_else(|| {
            PyValueError::new_err(format!("ggml type {ggml_type} is not kept quantised"))
        })?;
        let weight = py.detach(|| {
            // SAFETY: the file's contract.
            let blocks = unsafe { array(blocks_ptr, nbytes) };
            ggml::from_ggml(kind, blocks, in_features, out_features, order.as_deref())
        });
        Self::of(weight)
    }

    /// u8 or i8 [N, K] at `quants_ptr`; f32 [N, K / group] at `scales_ptr` and, if not None, `mins_ptr`.
    #[staticmethod]
    #[pyo3(signature = (bits, quants_ptr, scales_ptr, mins_ptr, in_features, out_features, group))]
    fn from_arrays(
        py: Python<'_>,
        bits: u8,
        quants_ptr: usize,
        scales_ptr: usize,
        mins_ptr: Option<usize>,
        in_features: usize,
        out_features: usize,
        group: usize,
    ) -> PyResult<Self> {
        let small = if group.is_multiple_of(kernels::MAX_GROUP) {
            kernels::MAX_GROUP
        } else {
            kernels::MAX_GROUP / 2
        };
        let num_values = in_features.checked_mul(out_features);
        let (Some(num_values), true) = (
            num_values,
            group > 0 && group.is_multiple_of(small) && in_features.is_multiple_of(group),
        ) else {
            return Err(PyValueError::new_err(format!(
                "weight of {out_features}x{in_features} in groups of {group}, expected whole groups of a multiple of 16"
            )));
        };
        let format = kernels::QuantFormat {
            bits: bits_of(bits)?,
            group: small,
            has_mins: mins_ptr.is_some(),
        };
        let weight = py.detach(|| {
            // SAFETY: the file's contract.
            let quants = unsafe { array::<u8>(quants_ptr, num_values) };
            // SAFETY: the file's contract.
            let scales = unsafe { array::<f32>(scales_ptr, num_values / group) };
            let scales = repeated(scales, group, small);
            let mins = mins_ptr.map(|mins_ptr| {
                // SAFETY: the file's contract.
                let mins = unsafe { array::<f32>(mins_ptr, num_values / group) };
                repeated(mins, group, small)
            });
            kernels::QuantizedWeight::new(
                format,
                in_features,
                out_features,
                quants.to_vec(),
                scales,
                mins.unwrap_or_default(),
            )
        });
        Self::of(weight)
    }

    /// Values [N, K] of `dtype` at `weight_ptr`; `to` is "int8" or "int4".
    #[staticmethod]
    fn quantize(
        py: Python<'_>,
        weight_ptr: usize,
        dtype: &str,
        in_features: usize,
        out_features: usize,
        to: &str,
    ) -> PyResult<Self> {
        let dtype = StorageDtype::parse(dtype).ok_or_else(|| {
            PyValueError::new_err(format!("weights of dtype {dtype:?} can't be quantised"))
        })?;
        let num_values = in_features.checked_mul(out_features).ok_or_else(|| {
            PyValueError::new_err(format!("weight of {out_features}x{in_features} overflows"))
        })?;
        let row = |n: usize, row: &mut [f32]| match dtype {
            StorageDtype::Float32 => {
                // SAFETY: the file's contract.
                let weight = unsafe { array::<f32>(weight_ptr, num_values) };
                row.copy_from_slice(&weight[n * in_features..][..in_features]);
            }
            StorageDtype::BFloat16 => {
                // SAFETY: the file's contract.
                let weight = unsafe { array::<u16>(weight_ptr, num_values) };
                for (value, &bits) in row.iter_mut().zip(&weight[n * in_features..]) {
                    *value = bf16::from_bits(bits).to_f32();
                }
            }
            StorageDtype::Float16 => {
                // SAFETY: the file's contract.
                let weight = unsafe { array::<u16>(weight_ptr, num_values) };
                for (value, &bits) in row.iter_mut().zip(&weight[n * in_features..]) {
                    *value = f16::from_bits(bits).to_f32();
                }
            }
        };
        let weight = match to {
            "int8" => py.detach(|| make::to_int8(in_features, out_features, row)),
            "int4" => py.detach(|| make::to_int4(in_features, out_features, row)),
            _ => {
                let message = format!("weights are quantised to int8 or int4, not {to:?}");
                return Err(PyValueError::new_err(message));
            }
        };
        Self::of(weight)
    }

    #[getter]
    fn in_features(&self) -> usize {
        self.inner.in_features()
    }

    #[getter]
    fn out_features(&self) -> usize {
        self.inner.out_features()
    }

    #[getter]
    fn bits(&self) -> u8 {
        number_of(self.inner.format().bits)
    }

    #[getter]
    fn group(&self) -> usize {
        self.inner.format().group
    }

    #[getter]
    fn has_mins(&self) -> bool {
        self.inner.format().has_mins
    }

    /// f32 [N, K] to `out_ptr`.
    fn dequantize(&self, py: Python<'_>, out_ptr: usize) {
        let columns = self.inner.in_features();
        py.detach(|| {
            // SAFETY: the file's contract.
            let out = unsafe { array_mut::<f32>(out_ptr, columns * self.inner.out_features()) };
            for (n, row) in out.chunks_exact_mut(columns).enumerate() {
                self.inner.dequantize(n, row);
            }
        });
    }

    /// As `from_arrays` takes them, in groups of `group` columns; `mins_ptr` only where there are any.
    #[pyo3(signature = (quants_ptr, scales_ptr, mins_ptr=None))]
    fn copy_to(
        &self,
        py: Python<'_>,
        quants_ptr: usize,
        scales_ptr: usize,
        mins_ptr: Option<usize>,
    ) -> PyResult<()> {
        if mins_ptr.is_some() != self.has_mins() {
            let message = "minimums are copied exactly where there are any";
            return Err(PyValueError::new_err(message));
        }
        let (columns, rows) = (self.inner.in_features(), self.inner.out_features());
        let num_groups = columns / self.group();
        py.detach(|| {
            // SAFETY: the file's contract.
            let quants = unsafe { array_mut::<u8>(quants_ptr, columns * rows) };
            // SAFETY: the file's contract.
            let scales = unsafe { array_mut::<f32>(scales_ptr, num_groups * rows) };
            let mins_len = mins_ptr.map_or(0, |_| num_groups * rows);
            // SAFETY: the file's contract.
            let mins = unsafe { array_mut::<f32>(mins_ptr.unwrap_or(0), mins_len) };
            for n in 0..rows {
                quants[n * columns..][..columns].copy_from_slice(self.inner.quants(n));
                scales[n * num_groups..][..num_groups].copy_from_slice(self.inner.scales(n));
                if !mins.is_empty() {
                    mins[n * num_groups..][..num_groups].copy_from_slice(self.inner.mins(n));
                }
            }
        });
        Ok(())
    }
}

impl QuantizedWeight {
    fn of(weight: Result<kernels::QuantizedWeight, KernelError>) -> PyResult<Self> {
        let inner = weight.map_err(|error| of_kernel(&error))?;
        Ok(Self { inner })
    }
}

/// (bits, group, whether there are minimums) of the weights that a ggml type holds; None where they are not kept.
#[pyfunction]
fn ggml_format(ggml_type: u32) -> Option<(u8, usize, bool)> {
    let format = GgmlType::from_number(ggml_type)?.format();
    Some((number_of(format.bits), format.group, format.has_mins))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(ggml_format, m)?)?;
    m.add_class::<QuantizedWeight>()
}
