//! `Batch`: a step's arrays on their way from the scheduler to the kernels; Python holds it and looks at its sizes.

use loraserve_core as core;
use loraserve_kernels::cuda::work_list::num_items;
use loraserve_kernels::step_arrays::StepArrays;
use loraserve_sim::{self as sim, StepShape};
use numpy::{Element, IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::errors::of_kernel;

/// One step's work as flat arrays.
#[pyclass(frozen, module = "loraserve._core")]
pub struct Batch {
    pub arrays: StepArrays,
    #[pyo3(get)]
    pub num_prefill_tokens: usize,
    #[pyo3(get)]
    request_ids: Vec<u64>,
    #[pyo3(get)]
    sample_request_ids: Vec<u64>,
    #[pyo3(get)]
    draft_token_ids: Vec<i32>,
    #[pyo3(get)]
    hidden_spans: Vec<(u64, usize, usize)>,
}

impl From<core::Batch> for Batch {
    fn from(batch: core::Batch) -> Self {
        Self {
            num_prefill_tokens: batch.num_prefill_tokens,
            request_ids: batch.request_ids,
            sample_request_ids: batch.sample_request_ids,
            draft_token_ids: batch.draft_token_ids,
            hidden_spans: batch.hidden_spans.iter().map(fields).collect(),
            arrays: StepArrays {
                token_ids: batch.token_ids,
                positions: batch.positions,
                slot_mapping: batch.slot_mapping,
                query_indptr: batch.query_indptr,
                context_lens: batch.context_lens,
                block_table: batch.block_table,
                block_table_indptr: batch.block_table_indptr,
                logits_indices: batch.logits_indices,
                hidden_indices: batch.hidden_indices,
                wave_indptr: batch.wave_indptr,
                seg_start: batch.seg_start,
                seg_end: batch.seg_end,
                seg_slot: batch.seg_slot,
                seg_weight: batch.seg_weight,
            },
        }
    }
}

/// (request, position, number of rows)
fn fields(span: &core::HiddenSpan) -> (u64, usize, usize) {
    (span.request.0, span.position, span.num_rows)
}

#[pymethods]
impl Batch {
    #[new]
    #[pyo3(signature = (arrays, num_prefill_tokens, hidden_indices=Vec::new()))]
    fn new(
        arrays: NumpyArrays<'_>,
        num_prefill_tokens: usize,
        hidden_indices: Vec<i32>,
    ) -> PyResult<Self> {
        Ok(Self {
            arrays: arrays.into_step(hidden_indices)?,
            hidden_spans: Vec::new(),
            num_prefill_tokens,
            request_ids: Vec::new(),
            sample_request_ids: Vec::new(),
            draft_token_ids: Vec::new(),
        })
    }

    #[getter]
    fn num_tokens(&self) -> usize {
        self.arrays.token_ids.len()
    }

    #[getter]
    fn num_seqs(&self) -> usize {
        self.arrays.context_lens.len()
    }

    #[getter]
    fn num_samples(&self) -> usize {
        self.arrays.logits_indices.len()
    }

    #[getter]
    fn num_hidden(&self) -> usize {
        self.arrays.hidden_indices.len()
    }

    #[getter]
    fn hidden_indices<'py>(&self, py: Python<'py>) -> IntArray<'py> {
        self.arrays.hidden_indices.clone().into_pyarray(py)
    }

    #[getter]
    fn num_waves(&self) -> usize {
        self.arrays.wave_indptr.len().saturating_sub(1)
    }

    #[getter]
    fn num_items(&self) -> usize {
        num_items(&self.arrays)
    }

    #[getter]
    fn slot_end(&self) -> i32 {
        self.arrays
            .slot_mapping
            .iter()
            .max()
            .map_or(0, |&slot| slot + 1)
    }

    /// For `from_bytes` of another process, which computes the same step.
    fn to_bytes<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.arrays.to_bytes())
    }

    /// The step's arrays, without whose they are; raises `ValueError`.
    #[staticmethod]
    fn from_bytes(data: &[u8]) -> PyResult<Self> {
        Ok(Self {
            arrays: StepArrays::from_bytes(data).map_err(|error| of_kernel(&error))?,
            hidden_spans: Vec::new(),
            num_prefill_tokens: 0,
            request_ids: Vec::new(),
            sample_request_ids: Vec::new(),
            draft_token_ids: Vec::new(),
        })
    }

    /// (rows, samples, pairs of prompts, tokens of contexts, rows of adapters, segments), and the slots in it.
    fn step_shape(&self) -> (Amounts, Vec<i32>) {
        let (shape, slots) = StepShape::of(sim::StepArrays {
            query_indptr: &self.arrays.query_indptr,
            context_lens: &self.arrays.context_lens,
            num_samples: self.arrays.logits_indices.len(),
            num_prefill_tokens: self.num_prefill_tokens,
            seg_start: &self.arrays.seg_start,
            seg_end: &self.arrays.seg_end,
            seg_slot: &self.arrays.seg_slot,
        });
        let amounts = (
            shape.rows,
            shape.samples,
            shape.prompt_pairs,
            shape.context_tokens,
            shape.adapter_rows,
            shape.segments,
        );
        (amounts, slots)
    }

    fn arrays<'py>(&self, py: Python<'py>) -> NumpyArrays<'py> {
        NumpyArrays::new(py, &self.arrays)
    }
}

/// Of a step's work, in the order of `StepRecord` in Python.
type Amounts = (f64, f64, f64, f64, f64, f64);

/// The arrays as a dict of `numpy` ones.
#[derive(FromPyObject, IntoPyObject)]
#[pyo3(from_item_all)]
struct NumpyArrays<'py> {
    token_ids: IntArray<'py>,
    positions: IntArray<'py>,
    slot_mapping: IntArray<'py>,
    query_indptr: IntArray<'py>,
    context_lens: IntArray<'py>,
    block_table: IntArray<'py>,
    block_table_indptr: IntArray<'py>,
    logits_indices: IntArray<'py>,
    wave_indptr: IntArray<'py>,
    seg_start: IntArray<'py>,
    seg_end: IntArray<'py>,
    seg_slot: IntArray<'py>,
    seg_weight: Bound<'py, PyArray1<f32>>,
}

type IntArray<'py> = Bound<'py, PyArray1<i32>>;

impl<'py> NumpyArrays<'py> {
    fn new(py: Python<'py>, arrays: &StepArrays) -> Self {
        let ints = |values: &Vec<i32>| values.clone().into_pyarray(py);
        Self {
            token_ids: ints(&arrays.token_ids),
            positions: ints(&arrays.positions),
            slot_mapping: ints(&arrays.slot_mapping),
            query_indptr: ints(&arrays.query_indptr),
            context_lens: ints(&arrays.context_lens),
            block_table: ints(&arrays.block_table),
            block_table_indptr: ints(&arrays.block_table_indptr),
            logits_indices: ints(&arrays.logits_indices),
            wave_indptr: ints(&arrays.wave_indptr),
            seg_start: ints(&arrays.seg_start),
            seg_end: ints(&arrays.seg_end),
            seg_slot: ints(&arrays.seg_slot),
            seg_weight: arrays.seg_weight.clone().into_pyarray(py),
        }
    }

    fn into_step(self, hidden_indices: Vec<i32>) -> PyResult<StepArrays> {
        Ok(StepArrays {
            hidden_indices,
            token_ids: copy(&self.token_ids)?,
            positions: copy(&self.positions)?,
            slot_mapping: copy(&self.slot_mapping)?,
            query_indptr: copy(&self.query_indptr)?,
            context_lens: copy(&self.context_lens)?,
            block_table: copy(&self.block_table)?,
            block_table_indptr: copy(&self.block_table_indptr)?,
            logits_indices: copy(&self.logits_indices)?,
            wave_indptr: copy(&self.wave_indptr)?,
            seg_start: copy(&self.seg_start)?,
            seg_end: copy(&self.seg_end)?,
            seg_slot: copy(&self.seg_slot)?,
            seg_weight: copy(&self.seg_weight)?,
        })
    }
}

fn copy<T: Element + Copy>(array: &Bound<'_, PyArray1<T>>) -> PyResult<Vec<T>> {
    let array: PyReadonlyArray1<'_, T> = array.extract()?;
    Ok(array.as_slice()?.to_vec())
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Batch>()
}
