//! Recording a model's forward pass, and running it: one call a step.

use std::ptr::NonNull;
use std::sync::Mutex;

use loraserve_adapters::StorageDtype;
use loraserve_kernels::KernelError;
use loraserve_kernels::cpu::element::Bf16;
use loraserve_kernels::cpu::program::{self, Constant, Program, Recording};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::{CpuKernels, CpuStep, PackedLinear, detached};
use crate::errors::of_kernel;

/// A tensor [T, width] that a recorded op makes; T is known when the program runs.
#[pyclass(frozen, module = "loraserve._core")]
pub struct Activation {
    inner: program::Activation,
}

#[pymethods]
impl Activation {
    #[getter]
    fn width(&self) -> usize {
        self.inner.width()
    }
}

/// A forward pass being recorded. Addresses are of tensors that outlive the program, unchanged.
#[pyclass(frozen, module = "loraserve._core")]
pub struct CpuRecording {
    /// Taken when the program ends.
    inner: Mutex<Option<Recording>>,
}

#[pymethods]
impl CpuRecording {
    #[new]
    fn new() -> Self {
        Self {
            inner: Mutex::new(Some(Recording::default())),
        }
    }

    /// `rows_ptr`: [`num_rows`, width] of the storage dtype, one row for each token of a step.
    fn input(&self, rows_ptr: usize, num_rows: usize, width: usize) -> PyResult<Activation> {
        // SAFETY: the class's contract.
        let rows = unsafe { Constant::new(rows_ptr, num_rows * width) };
        self.record(|ops| Ok(ops.input(rows, width)))
    }

    fn embedding(&self, table: &Bound<'_, PackedLinear>) -> PyResult<Activation> {
        self.record(|ops| Ok(ops.embedding(table.get().inner.clone())))
    }

    #[pyo3(signature = (x, residual, weight_ptr, num_features, eps))]
    fn rms_norm(
        &self,
        x: &Bound<'_, Activation>,
        residual: Option<&Bound<'_, Activation>>,
        weight_ptr: usize,
        num_features: usize,
        eps: f32,
    ) -> PyResult<Activation> {
        let residual = residual.map(|residual| residual.get().inner);
        // SAFETY: the class's contract.
        let weight = unsafe { Constant::new(weight_ptr, num_features) };
        self.record(|ops| ops.norm(x.get().inner, residual, weight, eps))
    }

    fn lora_linear(
        &self,
        x: &Bound<'_, Activation>,
        linear: &Bound<'_, PackedLinear>,
        layer: usize,
        group: usize,
    ) -> PyResult<Activation> {
        let linear = linear.get().inner.clone();
        self.record(|ops| ops.lora_linear(x.get().inner, linear, layer, group))
    }

    /// What a linear or the embedding has just made is a part of a sum over ranks.
    fn all_reduce(&self, x: &Bound<'_, Activation>) -> PyResult<()> {
        self.record(|ops| ops.all_reduce(x.get().inner))
    }

    #[pyo3(signature = (qkv, layer, cos_sin_ptr, num_positions, head_dim, q_norm_ptr, k_norm_ptr, eps))]
    fn rope_and_cache(
        &self,
        qkv: &Bound<'_, Activation>,
        layer: usize,
        cos_sin_ptr: usize,
        num_positions: usize,
        head_dim: usize,
        q_norm_ptr: Option<usize>,
        k_norm_ptr: Option<usize>,
        eps: f32,
    ) -> PyResult<()> {
        // SAFETY: the class's contract.
        let cos_sin = unsafe { Constant::new(cos_sin_ptr, num_positions * head_dim) };
        // SAFETY: the class's contract.
        let norm = |address| unsafe { Constant::new(address, head_dim) };
        let (q_norm, k_norm) = (q_norm_ptr.map(norm), k_norm_ptr.map(norm));
        self.record(|ops| ops.rope_and_cache(qkv.get().inner, layer, cos_sin, q_norm, k_norm, eps))
    }

    fn attention(
        &self,
        qkv: &Bound<'_, Activation>,
        layer: usize,
        num_features: usize,
    ) -> PyResult<Activation> {
        self.record(|ops| ops.attention(qkv.get().inner, layer, num_features))
    }

    fn silu_mul(&self, gate_up: &Bound<'_, Activation>) -> PyResult<Activation> {
        self.record(|ops| ops.silu_mul(gate_up.get().inner))
    }

    /// Ends the recording with logits.
    fn logits(
        &self,
        kernels: Py<CpuKernels>,
        hidden: &Bound<'_, Activation>,
        lm_head: &Bound<'_, PackedLinear>,
    ) -> PyResult<CpuProgram> {
        let lm_head = lm_head.get().inner.clone();
        self.end(kernels, |ops| ops.logits(hidden.get().inner, lm_head))
    }

    /// Ends the recording with an activation.
    fn output(&self, kernels: Py<CpuKernels>, x: &Bound<'_, Activation>) -> PyResult<CpuProgram> {
        self.end(kernels, |ops| ops.output(x.get().inner))
    }
}

impl CpuRecording {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Recording>> {
        self.inner
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// What an op adds to a recording: the result's name, if it has one.
trait Recorded {
    type Python;
    fn into_python(self) -> Self::Python;
}

impl Recorded for () {
    type Python = ();
    fn into_python(self) {}
}

impl Recorded for program::Activation {
    type Python = Activation;
    fn into_python(self) -> Activation {
        Activation { inner: self }
    }
}

impl CpuRecording {
    fn record<R: Recorded>(
        &self,
        op: impl FnOnce(&mut Recording) -> Result<R, KernelError>,
    ) -> PyResult<R::Python> {
        let mut recording = self.lock();
        let result = op(recording.as_mut().ok_or_else(ended)?);
        Ok(result.map_err(|error| of_kernel(&error))?.into_python())
    }

    fn end(
        &self,
        kernels: Py<CpuKernels>,
        op: impl FnOnce(Recording) -> Result<Program, KernelError>,
    ) -> PyResult<CpuProgram> {
        let recording = self.lock().take().ok_or_else(ended)?;
        let inner = op(recording).map_err(|error| of_kernel(&error))?;
        Ok(CpuProgram { kernels, inner })
    }
}

fn ended() -> PyErr {
    PyValueError::new_err("the recording has ended, begin another")
}

/// A recorded forward pass of one model.
#[pyclass(frozen, module = "loraserve._core")]
pub struct CpuProgram {
    kernels: Py<CpuKernels>,
    inner: Program,
}

#[pymethods]
impl CpuProgram {
    /// Runs a step that these kernels began; `result_ptr`: float32 [L, the step's columns], or [T, width] of the
    /// storage dtype where an activation is the output; `hidden_ptr`: [H, width] of the storage dtype.
    ///
    /// Where there are ranks, stops at each sum over them: gives address and number of the float32 that are this
    /// rank's part, and the `first_op` to go on with once they are the sum.
    #[pyo3(signature = (step, result_ptr, hidden_ptr=0, first_op=0))]
    fn run(
        &self,
        py: Python<'_>,
        step: &Bound<'_, CpuStep>,
        result_ptr: usize,
        hidden_ptr: usize,
        first_op: usize,
    ) -> PyResult<Option<(usize, usize, usize)>> {
        let (context, step) = (&self.kernels.get().inner, &step.get().inner);
        if step.num_hidden() > 0 && hidden_ptr == 0 {
            return Err(PyValueError::new_err(
                "the step gives rows out, and has no place for them",
            ));
        }
        let stopped = py.detach(|| {
            let (result, hidden) = (address(result_ptr), address(hidden_ptr));
            // SAFETY: the file's contract of `cpu_kernels`.
            with_element!(context.dtype, E => unsafe {
                self.inner.run::<E>(context, step, result, hidden, first_op)
            })
        });
        let stopped = stopped.map_err(|error| of_kernel(&error))?;
        Ok(stopped.map(|sum| (sum.address, sum.len, sum.next_op)))
    }

    /// Logits of `count` of the rows that a step gave out, from the `first` on; `rows_ptr`: [count, width] of the
    /// storage dtype, what it gave out; `result_ptr`: float32 [count, the step's columns].
    fn logits_of_hidden(
        &self,
        py: Python<'_>,
        step: &Bound<'_, CpuStep>,
        first: usize,
        count: usize,
        rows_ptr: usize,
        result_ptr: usize,
    ) -> PyResult<()> {
        let (context, step) = (&self.kernels.get().inner, &step.get().inner);
        detached(py, || {
            let (rows, result) = (address(rows_ptr), address(result_ptr));
            // SAFETY: the file's contract of `cpu_kernels`.
            with_element!(context.dtype, E => unsafe {
                self.inner.logits_of_hidden::<E>(context, step, (first, count), rows, result)
            })
        })
    }
}

/// Of a tensor; an empty one has no address, and nobody reads or writes it.
fn address(address: usize) -> NonNull<u8> {
    NonNull::new(address as *mut f32).map_or(NonNull::<f32>::dangling().cast(), NonNull::cast)
}
