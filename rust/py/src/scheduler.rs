//! The scheduler for Python: `Scheduler`, its `Step` and the step's `Batch` of numpy arrays.

use loraserve_core::{
    self as core, AdapterId, AdapterInfo, CacheScope, Error, Failure, FinishReason, NewRequest,
    Output, RequestId, SchedulerConfig,
};
use numpy::{Element, IntoPyArray, PyArray1, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::errors;

/// (request id, token id, finish reason, (error class, message), cached prompt tokens).
type OutputTuple = (
    u64,
    Option<i32>,
    Option<&'static str>,
    Option<(String, String)>,
    usize,
);

/// One step's work as flat arrays.
#[pyclass(frozen, get_all, module = "loraserve._core")]
pub struct Batch {
    token_ids: Py<PyArray1<i32>>,
    positions: Py<PyArray1<i32>>,
    slot_mapping: Py<PyArray1<i32>>,
    query_indptr: Py<PyArray1<i32>>,
    context_lens: Py<PyArray1<i32>>,
    block_table: Py<PyArray1<i32>>,
    block_table_indptr: Py<PyArray1<i32>>,
    logits_indices: Py<PyArray1<i32>>,
    sample_request_ids: Py<PyArray1<u64>>,
    wave_indptr: Py<PyArray1<i32>>,
    seg_start: Py<PyArray1<i32>>,
    seg_end: Py<PyArray1<i32>>,
    seg_slot: Py<PyArray1<i32>>,
    seg_weight: Py<PyArray1<f32>>,
    num_tokens: usize,
    num_seqs: usize,
    num_prefill_tokens: usize,
}

impl Batch {
    fn new(py: Python<'_>, batch: core::Batch) -> Self {
        Self {
            num_tokens: batch.num_tokens(),
            num_seqs: batch.num_seqs(),
            num_prefill_tokens: batch.num_prefill_tokens,
            token_ids: array(py, batch.token_ids),
            positions: array(py, batch.positions),
            slot_mapping: array(py, batch.slot_mapping),
            query_indptr: array(py, batch.query_indptr),
            context_lens: array(py, batch.context_lens),
            block_table: array(py, batch.block_table),
            block_table_indptr: array(py, batch.block_table_indptr),
            logits_indices: array(py, batch.logits_indices),
            sample_request_ids: array(py, batch.sample_request_ids),
            wave_indptr: array(py, batch.wave_indptr),
            seg_start: array(py, batch.seg_start),
            seg_end: array(py, batch.seg_end),
            seg_slot: array(py, batch.seg_slot),
            seg_weight: array(py, batch.seg_weight),
        }
    }
}

/// What to do next: moves, then loads, then the batch.
#[pyclass(frozen, module = "loraserve._core")]
pub struct Step {
    id: u64,
    #[pyo3(get)]
    moves: Vec<(u32, u32, u32, usize)>,
    #[pyo3(get)]
    loads: Vec<(u32, u32, u32, usize)>,
    #[pyo3(get)]
    admitted: Vec<u64>,
    #[pyo3(get)]
    batch: Option<Py<Batch>>,
}

#[pyclass(module = "loraserve._core")]
pub struct Scheduler {
    inner: core::Scheduler,
}

#[pymethods]
impl Scheduler {
    #[new]
    #[pyo3(signature = (*, num_pages, page_nbytes, block_size, max_num_seqs, max_batched_tokens, max_model_len, prefix_caching=true, max_num_slots=None))]
    fn new(
        py: Python<'_>,
        num_pages: usize,
        page_nbytes: usize,
        block_size: usize,
        max_num_seqs: usize,
        max_batched_tokens: usize,
        max_model_len: usize,
        prefix_caching: bool,
        max_num_slots: Option<usize>,
    ) -> PyResult<Self> {
        let config = SchedulerConfig {
            num_pages,
            page_nbytes,
            block_size,
            max_num_seqs,
            max_batched_tokens,
            max_model_len,
            prefix_caching,
            max_num_slots: max_num_slots.unwrap_or(num_pages),
            ..SchedulerConfig::default()
        };
        let inner = core::Scheduler::new(config).map_err(raise(py))?;
        Ok(Self { inner })
    }

    #[pyo3(signature = (name, content_hash, nbytes, *, replace=false))]
    fn register_adapter(
        &mut self,
        py: Python<'_>,
        name: &str,
        content_hash: &str,
        nbytes: usize,
        replace: bool,
    ) -> PyResult<u32> {
        let registered = if replace {
            self.inner.replace_adapter(name, content_hash, nbytes)
        } else {
            self.inner.register_adapter(name, content_hash, nbytes)
        };
        Ok(registered.map_err(raise(py))?.0)
    }

    fn unregister_adapter(&mut self, py: Python<'_>, name: &str) -> PyResult<()> {
        self.inner.unregister_adapter(name).map_err(raise(py))
    }

    fn warm_adapter(&mut self, py: Python<'_>, name: &str) -> PyResult<bool> {
        self.inner.warm_adapter(name).map_err(raise(py))
    }

    fn pin_adapter(&mut self, py: Python<'_>, name: &str, is_pinned: bool) -> PyResult<()> {
        let pinned = self.inner.pin_adapter(name, is_pinned);
        pinned.map_err(raise(py))
    }

    #[pyo3(signature = (prompt, adapters, max_tokens, min_tokens, stop_token_ids, cache_scope=(String::new(), String::new()), needs_adapter=false))]
    fn submit(
        &mut self,
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        adapters: Vec<(String, f32)>,
        max_tokens: Option<i64>,
        min_tokens: i64,
        stop_token_ids: Vec<i32>,
        cache_scope: (String, String),
        needs_adapter: bool,
    ) -> PyResult<u64> {
        let request = NewRequest {
            prompt: token_ids(py, prompt)?,
            adapters,
            max_tokens: max_tokens
                .map(|limit| count(py, "max_tokens", limit))
                .transpose()?,
            min_tokens: count(py, "min_tokens", min_tokens)?,
            stop_token_ids,
            scope: CacheScope {
                tenant: cache_scope.0.into(),
                salt: cache_scope.1.into(),
            },
            needs_adapter,
        };
        Ok(self.inner.submit(request).map_err(raise(py))?.0)
    }

    fn abort(&mut self, request_id: u64) -> bool {
        self.inner.abort(RequestId(request_id))
    }

    fn schedule(&mut self, py: Python<'_>) -> PyResult<Step> {
        let step = self.inner.schedule();
        let moves = step.moves.iter();
        let loads = step.loads.iter();
        Ok(Step {
            id: step.id,
            moves: moves
                .map(|m| (m.slot.0, m.src_page.0, m.dst_page.0, m.num_pages))
                .collect(),
            loads: loads
                .map(|l| (l.adapter.0, l.slot.0, l.first_page.0, l.num_pages))
                .collect(),
            admitted: step.admitted.iter().map(|id| id.0).collect(),
            batch: step
                .batch
                .map(|batch| Py::new(py, Batch::new(py, batch)))
                .transpose()?,
        })
    }

    fn commit(&mut self, step: &Step, token_ids: &Bound<'_, PyArray1<i32>>) {
        let token_ids: Vec<i32> = token_ids.readonly().as_array().iter().copied().collect();
        self.inner.commit(step.id, &token_ids);
    }

    fn adapter_loaded(&mut self, py: Python<'_>, adapter_id: u32) -> PyResult<()> {
        let answered = self.inner.adapter_loaded(AdapterId(adapter_id));
        answered.map_err(raise(py))
    }

    fn adapter_load_failed(
        &mut self,
        py: Python<'_>,
        adapter_id: u32,
        error_class: String,
        message: String,
    ) -> PyResult<()> {
        let failure = Failure {
            class: error_class,
            message,
        };
        let answered = self
            .inner
            .adapter_load_failed(AdapterId(adapter_id), &failure);
        answered.map_err(raise(py))
    }

    fn drain_outputs(&mut self) -> Vec<OutputTuple> {
        let outputs = self.inner.drain_outputs();
        outputs.into_iter().map(output_tuple).collect()
    }

    fn num_waiting(&self) -> usize {
        self.inner.num_waiting()
    }

    fn num_waiting_for_adapters(&self) -> usize {
        self.inner.num_waiting_for_adapters()
    }

    fn has_its_adapters(&self, request_id: u64) -> bool {
        self.inner.has_its_adapters(RequestId(request_id))
    }

    fn has_work(&self) -> bool {
        self.inner.has_work()
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = self.inner.stats();
        let dict = PyDict::new(py);
        dict.set_item("num_running", stats.num_running)?;
        dict.set_item("num_waiting", stats.num_waiting)?;
        dict.set_item("num_registered_adapters", stats.num_registered_adapters)?;
        dict.set_item("num_resident_adapters", stats.num_resident_adapters)?;
        dict.set_item("num_pages", stats.num_pages)?;
        dict.set_item("free_pages", stats.free_pages)?;
        dict.set_item("kv_pages", stats.kv_pages)?;
        dict.set_item("adapter_pages", stats.adapter_pages)?;
        dict.set_item("pinned_pages", stats.pinned_pages)?;
        dict.set_item("cached_pages", stats.cached_pages)?;
        dict.set_item("num_loads", stats.num_loads)?;
        dict.set_item("num_evictions", stats.num_evictions)?;
        dict.set_item("num_preemptions", stats.num_preemptions)?;
        dict.set_item("num_prefix_hit_tokens", stats.num_prefix_hit_tokens)?;
        Ok(dict)
    }

    fn adapters<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let adapters = self.inner.adapters();
        adapters.iter().map(|info| adapter_dict(py, info)).collect()
    }

    fn adapter_ids(&self) -> Vec<u32> {
        let ids = self.inner.adapter_ids();
        ids.into_iter().map(|id| id.0).collect()
    }

    fn check_invariants(&self) {
        self.inner.check_invariants();
    }
}

fn array<T: Element>(py: Python<'_>, values: Vec<T>) -> Py<PyArray1<T>> {
    values.into_pyarray(py).unbind()
}

fn raise(py: Python<'_>) -> impl Fn(Error) -> PyErr {
    move |error| errors::raise(py, error.kind().class(), error.to_string())
}

fn token_ids(py: Python<'_>, prompt: &Bound<'_, PyAny>) -> PyResult<Vec<i32>> {
    if let Ok(array) = prompt.extract::<PyReadonlyArray1<'_, i32>>() {
        return Ok(array.as_array().iter().copied().collect());
    }
    prompt.extract().map_err(|error: PyErr| {
        let message = format!("prompt must be a list of 32-bit token ids: {error}");
        errors::raise(py, "InvalidRequestError", message)
    })
}

fn count(py: Python<'_>, name: &str, value: i64) -> PyResult<usize> {
    usize::try_from(value).map_err(|_| {
        let message = format!("{name} is {value}, it can't be negative");
        errors::raise(py, "InvalidRequestError", message)
    })
}

fn output_tuple(output: Output) -> OutputTuple {
    let (finish, error) = match output.finish {
        None => (None, None),
        Some(FinishReason::Stop) => (Some("stop"), None),
        Some(FinishReason::Length) => (Some("length"), None),
        Some(FinishReason::Abort) => (Some("abort"), None),
        Some(FinishReason::Error(Failure { class, message })) => {
            (Some("error"), Some((class, message)))
        }
    };
    let cached = output.num_cached_tokens;
    (output.request.0, output.token, finish, error, cached)
}

fn adapter_dict<'py>(py: Python<'py>, info: &AdapterInfo) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("name", &info.name)?;
    dict.set_item("id", info.id.0)?;
    dict.set_item("hash", &*info.content_hash.0)?;
    dict.set_item("nbytes", info.nbytes)?;
    dict.set_item("state", info.state)?;
    dict.set_item("num_running", info.num_running)?;
    dict.set_item("num_waiting", info.num_waiting)?;
    dict.set_item("is_pinned", info.is_kept)?;
    dict.set_item("num_loads", info.num_loads)?;
    dict.set_item("num_evictions", info.num_evictions)?;
    Ok(dict)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Scheduler>()?;
    m.add_class::<Step>()?;
    m.add_class::<Batch>()
}
