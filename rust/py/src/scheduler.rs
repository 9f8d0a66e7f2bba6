//! The scheduler for Python: `Scheduler`, what it plans and what it tells of requests.

use loraserve_core::{
    self as core, AdapterContent, AdapterId, CacheScope, Failure, FinishReason, Flow, FlowWeight,
    NewRequest, PromptRows, RequestId, SchedulerConfig,
};
use numpy::{PyArray1, PyArrayMethods, PyReadonlyArray1};
use pyo3::exceptions::{PyBaseException, PyValueError};
use pyo3::prelude::*;

use crate::batch::Batch;
use crate::errors::{InvalidRequestError, of_core};
use crate::stats::{AdapterStats, FlowStats, SchedulerStats};

/// What to do next: moves, then loads, then the batch.
#[pyclass(frozen, module = "loraserve._core")]
pub struct SchedulerOutput {
    id: u64,
    #[pyo3(get)]
    moves: Vec<(u32, u32, u32, usize)>,
    #[pyo3(get)]
    loads: Vec<(u32, u32, u32, usize)>,
    #[pyo3(get)]
    admitted: Vec<(u64, usize)>,
    #[pyo3(get)]
    batch: Option<Py<Batch>>,
}

impl SchedulerOutput {
    fn new(py: Python<'_>, output: core::SchedulerOutput) -> PyResult<Self> {
        let moves = output.moves.iter();
        let loads = output.loads.iter();
        let admitted = output
            .admitted
            .iter()
            .map(|a| (a.request.0, a.num_cached_tokens));
        let batch = output.batch.map(|batch| Py::new(py, Batch::from(batch)));
        Ok(Self {
            id: output.id,
            moves: moves
                .map(|m| (m.slot.0, m.src_page.0, m.dst_page.0, m.num_pages))
                .collect(),
            loads: loads
                .map(|l| (l.adapter.0, l.slot.0, l.first_page.0, l.num_pages))
                .collect(),
            admitted: admitted.collect(),
            batch: batch.transpose()?,
        })
    }
}

/// What has come of requests: tokens that were not their last ones, as two lists, and ends.
#[pyclass(frozen, get_all, module = "loraserve._core")]
pub struct RequestOutputs {
    request_ids: Vec<u64>,
    token_ids: Vec<i32>,
    ends: Vec<Py<RequestEnd>>,
}

impl RequestOutputs {
    /// A request's end is behind all its tokens, so the two may be told apart.
    fn new(py: Python<'_>, outputs: Vec<core::RequestOutput>) -> PyResult<Self> {
        let mut all = Self {
            request_ids: Vec::with_capacity(outputs.len()),
            token_ids: Vec::with_capacity(outputs.len()),
            ends: Vec::new(),
        };
        for output in outputs {
            match (output.token, output.finish) {
                (token_id, Some(finish)) => {
                    let (finish_reason, error) = reason_and_error(py, finish);
                    let end = RequestEnd {
                        request_id: output.request.0,
                        token_id,
                        finish_reason,
                        error,
                    };
                    all.ends.push(Py::new(py, end)?);
                }
                (Some(token_id), None) => {
                    all.request_ids.push(output.request.0);
                    all.token_ids.push(token_id);
                }
                (None, None) => unreachable!("invariant: an event is a token, an end, or both"),
            }
        }
        Ok(all)
    }
}

/// A request's end, with the token that came with it.
#[pyclass(frozen, get_all, module = "loraserve._core")]
pub struct RequestEnd {
    request_id: u64,
    token_id: Option<i32>,
    finish_reason: Option<&'static str>,
    error: Option<Py<PyBaseException>>,
}

fn reason_and_error(
    py: Python<'_>,
    finish: FinishReason,
) -> (Option<&'static str>, Option<Py<PyBaseException>>) {
    match finish {
        FinishReason::Stop => (Some("stop"), None),
        FinishReason::Length => (Some("length"), None),
        FinishReason::Abort => (Some("abort"), None),
        FinishReason::Error(failure) => (None, Some(exception(py, &failure))),
    }
}

#[pyclass(module = "loraserve._core")]
pub struct Scheduler {
    inner: core::Scheduler,
}

#[pymethods]
impl Scheduler {
    #[new]
    #[pyo3(signature = (*, num_pages, page_nbytes, block_size, max_num_seqs, max_batched_tokens, max_model_len, prefix_caching=true, max_num_slots=None, max_draft_tokens=0, max_prefill_tokens=None, min_prefill_tokens=None, max_running_adapter_nbytes=None))]
    fn new(
        num_pages: usize,
        page_nbytes: usize,
        block_size: usize,
        max_num_seqs: usize,
        max_batched_tokens: usize,
        max_model_len: usize,
        prefix_caching: bool,
        max_num_slots: Option<usize>,
        max_draft_tokens: usize,
        max_prefill_tokens: Option<usize>,
        min_prefill_tokens: Option<usize>,
        max_running_adapter_nbytes: Option<usize>,
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
            max_draft_tokens,
            max_prefill_tokens: max_prefill_tokens.unwrap_or(usize::MAX),
            max_running_adapter_pages: max_running_adapter_nbytes
                .map_or(usize::MAX, |nbytes| (nbytes / page_nbytes.max(1)).max(1)),
            min_prefill_tokens: min_prefill_tokens.unwrap_or(usize::MAX),
            ..SchedulerConfig::default()
        };
        let inner = core::Scheduler::new(config).map_err(of_core)?;
        Ok(Self { inner })
    }

    #[pyo3(signature = (name, content_hash, nbytes, *, replace=false, invocation_tokens=Vec::new()))]
    fn register_adapter(
        &mut self,
        name: &str,
        content_hash: &str,
        nbytes: usize,
        replace: bool,
        invocation_tokens: Vec<i32>,
    ) -> PyResult<u32> {
        let content = AdapterContent {
            invocation: invocation_tokens.into(),
            ..AdapterContent::new(content_hash, nbytes)
        };
        let registered = if replace {
            self.inner.replace_adapter(name, content)
        } else {
            self.inner.register_adapter(name, content)
        };
        Ok(registered.map_err(of_core)?.0)
    }

    fn unregister_adapter(&mut self, name: &str) -> PyResult<()> {
        self.inner.unregister_adapter(name).map_err(of_core)
    }

    fn warm_adapter(&mut self, name: &str) -> PyResult<bool> {
        self.inner.warm_adapter(name).map_err(of_core)
    }

    fn pin_adapter(&mut self, name: &str, is_pinned: bool) -> PyResult<()> {
        self.inner.pin_adapter(name, is_pinned).map_err(of_core)
    }

    #[pyo3(signature = (prompt, adapters, max_tokens, min_tokens, stop_token_ids, cache_scope=(String::new(), String::new()), needs_adapter=false, without_guesses=false, prompt_rows=None, flow=(String::new(), 1.0)))]
    fn submit(
        &mut self,
        prompt: &Bound<'_, PyAny>,
        adapters: Vec<(String, f32)>,
        max_tokens: Option<i64>,
        min_tokens: i64,
        stop_token_ids: Vec<i32>,
        cache_scope: (String, String),
        needs_adapter: bool,
        without_guesses: bool,
        prompt_rows: Option<&str>,
        flow: (String, f64),
    ) -> PyResult<u64> {
        let request = NewRequest {
            prompt: token_ids(prompt)?,
            adapters,
            max_tokens: max_tokens
                .map(|limit| count("max_tokens", limit))
                .transpose()?,
            min_tokens: count("min_tokens", min_tokens)?,
            stop_token_ids,
            scope: CacheScope {
                tenant: cache_scope.0.into(),
                salt: cache_scope.1.into(),
            },
            flow: Flow {
                name: flow.0.into(),
                weight: FlowWeight::new(flow.1).map_err(of_core)?,
            },
            needs_adapter,
            without_guesses,
            prompt_rows: rows(prompt_rows)?,
        };
        Ok(self.inner.submit(request).map_err(of_core)?.0)
    }

    fn finish(&mut self, request_id: u64, reason: &Bound<'_, PyAny>) -> PyResult<bool> {
        let reason = finish_reason(reason)?;
        Ok(self.inner.finish(RequestId(request_id), reason))
    }

    fn draftable(&self) -> Vec<u64> {
        let requests = self.inner.draftable();
        requests.into_iter().map(|request| request.0).collect()
    }

    fn draft(&mut self, request_id: u64, forced: Vec<i32>) -> Vec<i32> {
        self.inner.draft(RequestId(request_id), forced)
    }

    fn give_draft(&mut self, request_id: u64, token_ids: Vec<i32>) {
        self.inner.give_draft(RequestId(request_id), token_ids);
    }

    fn schedule(&mut self, py: Python<'_>) -> PyResult<SchedulerOutput> {
        SchedulerOutput::new(py, self.inner.schedule())
    }

    fn schedule_ahead(&mut self, py: Python<'_>) -> PyResult<Option<SchedulerOutput>> {
        let planned = self.inner.schedule_ahead();
        planned
            .map(|output| SchedulerOutput::new(py, output))
            .transpose()
    }

    fn commit(
        &mut self,
        step: &SchedulerOutput,
        token_ids: &Bound<'_, PyArray1<i32>>,
    ) -> Vec<bool> {
        let token_ids: Vec<i32> = token_ids.readonly().as_array().iter().copied().collect();
        self.inner.commit(step.id, &token_ids)
    }

    fn adapter_loaded(&mut self, adapter_id: u32) -> PyResult<()> {
        let answered = self.inner.adapter_loaded(AdapterId(adapter_id));
        answered.map_err(of_core)
    }

    fn adapter_load_late(&mut self, adapter_id: u32) -> PyResult<()> {
        let announced = self.inner.adapter_load_late(AdapterId(adapter_id));
        announced.map_err(of_core)
    }

    fn adapter_load_failed(
        &mut self,
        adapter_id: u32,
        error: Bound<'_, PyBaseException>,
    ) -> PyResult<()> {
        let answered = self
            .inner
            .adapter_load_failed(AdapterId(adapter_id), &failure(error));
        answered.map_err(of_core)
    }

    fn drain_outputs(&mut self, py: Python<'_>) -> PyResult<RequestOutputs> {
        RequestOutputs::new(py, self.inner.drain_outputs())
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

    fn has_adapter_turnover(&self) -> bool {
        self.inner.has_adapter_turnover()
    }

    fn has_work(&self) -> bool {
        self.inner.has_work()
    }

    fn stats(&self) -> SchedulerStats {
        self.inner.stats().into()
    }

    fn flows(&self) -> (Vec<FlowStats>, (u64, u64)) {
        let (flows, forgotten) = self.inner.flows();
        let forgotten = (forgotten.num_prompt_tokens, forgotten.num_generated_tokens);
        (flows.into_iter().map(FlowStats::from).collect(), forgotten)
    }

    fn adapters(&self) -> Vec<AdapterStats> {
        let adapters = self.inner.adapters().into_iter();
        adapters.map(AdapterStats::from).collect()
    }

    fn adapter_ids(&self) -> Vec<u32> {
        let ids = self.inner.adapter_ids();
        ids.into_iter().map(|id| id.0).collect()
    }

    fn check_invariants(&self) {
        self.inner.check_invariants();
    }
}

fn token_ids(prompt: &Bound<'_, PyAny>) -> PyResult<Vec<i32>> {
    if let Ok(array) = prompt.extract::<PyReadonlyArray1<'_, i32>>() {
        return Ok(array.as_array().iter().copied().collect());
    }
    prompt.extract().map_err(|error: PyErr| {
        let message = format!("prompt must be a list of 32-bit token ids: {error}");
        InvalidRequestError::new_err(message)
    })
}

fn rows(name: Option<&str>) -> PyResult<PromptRows> {
    match name {
        None => Ok(PromptRows::None),
        Some("last") => Ok(PromptRows::Last),
        Some("all") => Ok(PromptRows::All),
        Some(other) => {
            let message = format!("prompt_rows is '{other}', expected 'last' or 'all'");
            Err(PyValueError::new_err(message))
        }
    }
}

fn count(name: &str, value: i64) -> PyResult<usize> {
    usize::try_from(value).map_err(|_| {
        let message = format!("{name} is {value}, it can't be negative");
        InvalidRequestError::new_err(message)
    })
}

/// `"abort"`, `"stop"` or the error it ends with.
fn finish_reason(reason: &Bound<'_, PyAny>) -> PyResult<FinishReason> {
    if let Ok(error) = reason.cast::<PyBaseException>() {
        return Ok(FinishReason::Error(failure(error.clone())));
    }
    match reason.extract::<String>()?.as_str() {
        "abort" => Ok(FinishReason::Abort),
        "stop" => Ok(FinishReason::Stop),
        other => {
            let message = format!("reason is '{other}', expected 'abort', 'stop' or an error");
            Err(PyValueError::new_err(message))
        }
    }
}

fn failure(error: Bound<'_, PyBaseException>) -> Failure {
    Failure::new(PyErr::from_value(error.into_any()))
}

fn exception(py: Python<'_>, failure: &Failure) -> Py<PyBaseException> {
    let error = failure.error::<PyErr>();
    let error = error.expect("invariant: Python gives the errors that requests end with");
    error.value(py).clone().unbind()
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Scheduler>()?;
    m.add_class::<SchedulerOutput>()?;
    m.add_class::<RequestOutputs>()?;
    m.add_class::<RequestEnd>()
}
