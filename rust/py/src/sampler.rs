//! What sampling knows of each sequence, and sampling on the host, for Python.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use loraserve_kernels::cpu::sampling::sample;
use loraserve_kernels::cpu::simd::Isa;
use loraserve_kernels::cpu::threads::ThreadPool;
use loraserve_kernels::sampling as kernels;
use loraserve_kernels::sampling::sequence::{SampledSequence, SequenceParams};
use numpy::PyReadonlyArray1;
use pyo3::exceptions::{PyKeyError, PyValueError};
use pyo3::prelude::*;

use crate::errors::of_kernel;
use crate::sample_arrays::{SampleArrays, SampledRows};

/// What sampling knows of every unfinished sequence. The lock is never held while the GIL is waited for.
#[pyclass(frozen, module = "loraserve._core")]
pub struct Sampler {
    sequences: Mutex<HashMap<u64, SampledSequence>>,
}

impl Sampler {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, SampledSequence>> {
        self.sequences
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn unknown(request_id: u64) -> PyErr {
    PyKeyError::new_err(format!("no sequence has request id {request_id}"))
}

#[pymethods]
impl Sampler {
    #[new]
    fn new() -> Self {
        Self {
            sequences: Mutex::default(),
        }
    }

    #[pyo3(signature = (request_id, *, seed=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, typical_p=1.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, num_logprobs=None, prompt_token_ids=Vec::new(), biased_ids=Vec::new(), biases=Vec::new(), end_token_ids=Vec::new(), min_tokens=0, has_grammar=false))]
    fn add(
        &self,
        request_id: u64,
        seed: u64,
        temperature: f32,
        top_k: usize,
        top_p: f64,
        min_p: f64,
        typical_p: f64,
        repetition_penalty: f32,
        presence_penalty: f32,
        frequency_penalty: f32,
        num_logprobs: Option<u16>,
        prompt_token_ids: Vec<i32>,
        biased_ids: Vec<i32>,
        biases: Vec<f32>,
        end_token_ids: Vec<i32>,
        min_tokens: usize,
        has_grammar: bool,
    ) -> PyResult<()> {
        if biases.len() != biased_ids.len() {
            let (biases, ids) = (biases.len(), biased_ids.len());
            let message = format!("there are {biases} biases for {ids} tokens");
            return Err(PyValueError::new_err(message));
        }
        let row = kernels::RowParams {
            temperature,
            top_k: u32::try_from(top_k).unwrap_or(0),
            top_p,
            min_p,
            typical_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            num_logprobs: num_logprobs.map_or(-1, i32::from),
            ..kernels::RowParams::default()
        };
        let sequence = SampledSequence::new(SequenceParams {
            seed,
            row,
            prompt_token_ids,
            biased_ids,
            biases,
            end_token_ids,
            min_tokens,
            has_grammar,
        });
        self.lock().insert(request_id, sequence);
        Ok(())
    }

    fn remove(&self, request_id: u64) {
        self.lock().remove(&request_id);
    }

    #[expect(clippy::needless_pass_by_value, reason = "what Python hands over")]
    fn append(&self, request_ids: Vec<u64>, token_ids: Vec<i32>) -> PyResult<()> {
        let mut sequences = self.lock();
        for (&request_id, &token_id) in request_ids.iter().zip(&token_ids) {
            let sequence = sequences.get_mut(&request_id);
            sequence
                .ok_or_else(|| unknown(request_id))?
                .append(token_id);
        }
        Ok(())
    }

    fn num_tokens(&self, request_id: u64) -> Option<usize> {
        self.lock()
            .get(&request_id)
            .map(SampledSequence::num_tokens)
    }

    #[expect(clippy::needless_pass_by_value, reason = "what Python hands over")]
    fn depend_on_last_token(&self, request_ids: Vec<u64>) -> bool {
        let sequences = self.lock();
        let mut known = request_ids.iter().filter_map(|id| sequences.get(id));
        known.any(SampledSequence::depends_on_last_token)
    }

    #[pyo3(signature = (request_ids, num_columns, masks=Vec::new(), masked_rows=Vec::new(), draft_token_ids=Vec::new()))]
    #[expect(clippy::needless_pass_by_value, reason = "what Python hands over")]
    fn draw(
        &self,
        request_ids: Vec<u64>,
        num_columns: usize,
        masks: Vec<PyReadonlyArray1<'_, u32>>,
        masked_rows: Vec<usize>,
        draft_token_ids: Vec<i32>,
    ) -> PyResult<SampleArrays> {
        let mut inner = kernels::SampleArrays::default();
        let num_words = kernels::mask_words(num_columns);
        for mask in &masks {
            let mask = mask.as_slice()?;
            if mask.len() != num_words {
                let message = format!("a mask has {} words, not {num_words}", mask.len());
                return Err(PyValueError::new_err(message));
            }
            inner.masks.extend_from_slice(mask);
        }
        inner.rows.reserve(request_ids.len());
        let mut sequences = self.lock();
        let mut masked = masked_rows
            .iter()
            .take(masks.len())
            .copied()
            .enumerate()
            .peekable();
        for (row, &request_id) in request_ids.iter().enumerate() {
            let mask = masked.next_if(|&(_, masked_row)| masked_row == row);
            let sequence = sequences
                .get_mut(&request_id)
                .ok_or_else(|| unknown(request_id))?;
            sequence.draw(mask.map(|(mask, _)| mask), &mut inner);
            match draft_token_ids.get(row) {
                None => {}
                Some(&-1) => sequence.forget_guesses(),
                Some(&guess) => {
                    let is_column = (0..num_columns).contains(&(guess as usize));
                    sequence.guess(is_column.then_some(guess));
                }
            }
        }
        for row in &mut inner.rows {
            if row.top_k as usize >= num_columns {
                row.top_k = 0; // all of them
            }
        }
        Ok(SampleArrays {
            vocab_size: num_columns,
            inner,
        })
    }
}

/// Samples rows of logits without the GIL.
///
/// # Safety
/// `shape` of them, rows and columns, lie at `logits_ptr`, as f32, until this returns.
pub unsafe fn sample_on(
    py: Python<'_>,
    pool: &ThreadPool,
    isa: Isa,
    logits_ptr: usize,
    shape: (usize, usize),
    arrays: &SampleArrays,
) -> PyResult<SampledRows> {
    let expected = (arrays.inner.rows.len(), arrays.vocab_size);
    if shape != expected {
        let message = format!("logits are {shape:?}, the rows to sample are {expected:?}");
        return Err(PyValueError::new_err(message));
    }
    let len = shape.0 * shape.1;
    let rows = py.detach(|| {
        let logits = if len == 0 {
            &[]
        } else {
            // SAFETY: the caller's contract.
            unsafe { std::slice::from_raw_parts(logits_ptr as *const f32, len) }
        };
        sample(pool, isa, logits, arrays.vocab_size, &arrays.inner)
    });
    Ok(SampledRows::new(
        py,
        rows.map_err(|error| of_kernel(&error))?,
    ))
}

/// Samples on threads of its own, where no backend's threads are at hand.
#[pyclass(frozen, module = "loraserve._core")]
pub struct HostSampler {
    pool: ThreadPool,
    isa: Isa,
}

#[pymethods]
impl HostSampler {
    #[new]
    #[pyo3(signature = (num_threads=None, isa=None))]
    fn new(num_threads: Option<usize>, isa: Option<&str>) -> PyResult<Self> {
        Ok(Self {
            isa: Isa::choose(isa).map_err(|error| of_kernel(&error))?,
            pool: ThreadPool::new(num_threads),
        })
    }

    /// The caller has checked that the logits are f32 and contiguous, and keeps them alive.
    fn sample(
        &self,
        py: Python<'_>,
        logits_ptr: usize,
        num_rows: usize,
        num_columns: usize,
        arrays: &Bound<'_, SampleArrays>,
    ) -> PyResult<SampledRows> {
        let (arrays, shape) = (arrays.get(), (num_rows, num_columns));
        // SAFETY: as above.
        unsafe { sample_on(py, &self.pool, self.isa, logits_ptr, shape, arrays) }
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Sampler>()?;
    m.add_class::<HostSampler>()
}
