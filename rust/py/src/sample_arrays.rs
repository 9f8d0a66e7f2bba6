//! `SampleArrays`: how the rows of one step are sampled, on its way to the kernels.

use loraserve_kernels::sampling as kernels;
use loraserve_kernels::sampling::reference::{SampledRow, sample_row};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::of_kernel;

/// The rows of one step.
#[pyclass(frozen, module = "loraserve._core")]
pub struct SampleArrays {
    pub vocab_size: usize,
    pub inner: kernels::SampleArrays,
}

/// A row as a dict.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Row {
    bits: u64,
    temperature: f32,
    top_k: u32,
    top_p: f64,
    min_p: f64,
    typical_p: f64,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    num_logprobs: Option<u16>,
    mask: Option<u16>,
    seen: [u32; 2],
    counted: [u32; 2],
    biased: [u32; 2],
    banned: [u32; 2],
}

impl From<Row> for kernels::RowParams {
    fn from(row: Row) -> Self {
        let index = |index: Option<u16>| index.map_or(-1, i32::from);
        Self {
            bits: row.bits,
            top_p: row.top_p,
            min_p: row.min_p,
            typical_p: row.typical_p,
            temperature: row.temperature,
            repetition_penalty: row.repetition_penalty,
            presence_penalty: row.presence_penalty,
            frequency_penalty: row.frequency_penalty,
            top_k: row.top_k,
            mask: index(row.mask),
            num_logprobs: index(row.num_logprobs),
            seen: row.seen,
            counted: row.counted,
            biased: row.biased,
            banned: row.banned,
            unused: 0,
        }
    }
}

#[pymethods]
impl SampleArrays {
    #[new]
    #[pyo3(signature = (vocab_size, rows, *, seen_ids=Vec::new(), counted_ids=Vec::new(), counts=Vec::new(), biased_ids=Vec::new(), biases=Vec::new(), banned_ids=Vec::new(), masks=Vec::new()))]
    fn new(
        vocab_size: usize,
        rows: Vec<Row>,
        seen_ids: Vec<i32>,
        counted_ids: Vec<i32>,
        counts: Vec<f32>,
        biased_ids: Vec<i32>,
        biases: Vec<f32>,
        banned_ids: Vec<i32>,
        masks: Vec<u32>,
    ) -> Self {
        let inner = kernels::SampleArrays {
            rows: rows.into_iter().map(Into::into).collect(),
            seen_ids,
            counted_ids,
            counts,
            biased_ids,
            biases,
            banned_ids,
            masks,
        };
        Self { vocab_size, inner }
    }

    #[getter]
    fn num_rows(&self) -> usize {
        self.inner.rows.len()
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    #[expect(clippy::needless_pass_by_value, reason = "what Python hands over")]
    fn reference(
        &self,
        py: Python<'_>,
        logits: PyReadonlyArray2<'_, f32>,
    ) -> PyResult<SampledRows> {
        let (rows, vocab_size) = (&self.inner.rows, self.vocab_size);
        let refused = |error| of_kernel(&error);
        self.inner.check(vocab_size).map_err(refused)?;
        if logits.shape() != [rows.len(), vocab_size] {
            let (shape, num_rows) = (logits.shape(), rows.len());
            let message = format!("logits are {shape:?}, expected [{num_rows}, {vocab_size}]");
            return Err(PyValueError::new_err(message));
        }
        let rows = rows.iter().zip(logits.as_slice()?.chunks(vocab_size));
        let sampled = rows.map(|(row, logits)| sample_row(logits, row, &self.inner));
        Ok(SampledRows::new(py, sampled.collect()))
    }
}

type Logprob = (f32, Vec<(i32, f32)>);

/// What came of a step's rows.
#[pyclass(frozen, module = "loraserve._core")]
pub struct SampledRows {
    #[pyo3(get)]
    token_ids: Py<PyArray1<i32>>,
    #[pyo3(get)]
    is_finite: Py<PyArray1<bool>>,
    #[pyo3(get)]
    logprobs: Vec<Option<Logprob>>,
}

impl SampledRows {
    pub fn new(py: Python<'_>, rows: Vec<SampledRow>) -> Self {
        let token_ids: Vec<_> = rows.iter().map(|row| row.token_id).collect();
        let is_finite: Vec<_> = rows.iter().map(|row| row.is_finite).collect();
        let logprobs = rows.into_iter().map(|row| row.logprobs);
        Self {
            token_ids: token_ids.into_pyarray(py).unbind(),
            is_finite: is_finite.into_pyarray(py).unbind(),
            logprobs: logprobs
                .map(|row| row.map(|row| (row.chosen, row.top)))
                .collect(),
        }
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<SampledRows>()?;
    m.add_class::<SampleArrays>()
}
