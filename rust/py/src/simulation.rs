//! The simulator for Python: `simulate`, and a step's shape as the cost model sees it.

use std::sync::Arc;

use loraserve_core::SchedulerConfig;
use loraserve_sim as sim;
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::{InvalidRequestError, of_core};

fn of_sim(error: sim::Error) -> PyErr {
    match error {
        sim::Error::Scheduler(error) => of_core(error),
        other => InvalidRequestError::new_err(other.to_string()),
    }
}

/// What steps and loads cost, in seconds.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Costs {
    rows: Vec<(f64, f64)>,
    sample: f64,
    prompt_pair: f64,
    context_token: f64,
    any_adapter: f64,
    adapter_byte: f64,
    adapter_row: f64,
    segment: f64,
    load: f64,
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Loading {
    lanes: usize,
    latency_s: f64,
    bytes_per_s: f64,
    rest_s_per_byte: f64,
    max_open_at_rest: usize,
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Replica {
    num_pages: usize,
    page_nbytes: usize,
    block_size: usize,
    max_num_seqs: usize,
    max_batched_tokens: usize,
    max_prefill_tokens: Option<usize>,
    min_prefill_tokens: Option<usize>,
    max_running_adapter_nbytes: Option<usize>,
    max_model_len: usize,
    max_num_slots: usize,
    max_waiting: Option<usize>,
    prefix_caching: bool,
    runs_ahead: bool,
    flow_by_adapter: bool,
}

#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Fleet {
    num_replicas: usize,
    policy: String,
    spill_factor: f64,
    spill_slack: f64,
    resident_s: f64,
    router_interval_s: f64,
    num_threads: usize,
}

/// Arrays of one length: -1 is the base model.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct Arrivals<'py> {
    at_s: PyReadonlyArray1<'py, f64>,
    adapter: PyReadonlyArray1<'py, i64>,
    prompt_tokens: PyReadonlyArray1<'py, u32>,
    answer_tokens: PyReadonlyArray1<'py, u32>,
    prefix: PyReadonlyArray1<'py, u32>,
    prefix_tokens: PyReadonlyArray1<'py, u32>,
}

impl Arrivals<'_> {
    fn read(&self, sizes: Vec<u64>) -> PyResult<sim::Workload> {
        let (at_s, adapter) = (self.at_s.as_slice()?, self.adapter.as_slice()?);
        let (prompts, answers) = (
            self.prompt_tokens.as_slice()?,
            self.answer_tokens.as_slice()?,
        );
        let (prefixes, prefix_tokens) = (self.prefix.as_slice()?, self.prefix_tokens.as_slice()?);
        let lengths = [
            adapter.len(),
            prompts.len(),
            answers.len(),
            prefixes.len(),
            prefix_tokens.len(),
        ];
        if lengths.iter().any(|&length| length != at_s.len()) {
            return Err(PyValueError::new_err(
                "arrays of arrivals must have one length",
            ));
        }
        let arrivals = (0..at_s.len()).map(|i| sim::Arrival {
            at_s: at_s[i],
            adapter: u32::try_from(adapter[i]).ok(),
            prompt_tokens: prompts[i],
            answer_tokens: answers[i],
            prefix: prefixes[i],
            prefix_tokens: prefix_tokens[i],
        });
        sim::Workload::new(arrivals.collect(), sim::Adapters::new(sizes)).map_err(of_sim)
    }
}

fn config(
    costs: Costs,
    loading: &Loading,
    replica: &Replica,
    fleet: &Fleet,
) -> PyResult<sim::FleetConfig> {
    let policy = sim::Policy::named(&fleet.policy).ok_or_else(|| {
        let names: Vec<_> = sim::Policy::ALL.iter().map(|&(name, _)| name).collect();
        let message = format!(
            "policy is '{}', expected one of {}",
            fleet.policy,
            names.join(", ")
        );
        InvalidRequestError::new_err(message)
    })?;
    let costs = sim::CostModel {
        rows: costs.rows,
        sample: costs.sample,
        prompt_pair: costs.prompt_pair,
        context_token: costs.context_token,
        any_adapter: costs.any_adapter,
        adapter_byte: costs.adapter_byte,
        adapter_row: costs.adapter_row,
        segment: costs.segment,
        load: costs.load,
    };
    let replica = sim::ReplicaConfig {
        scheduler: SchedulerConfig {
            num_pages: replica.num_pages,
            page_nbytes: replica.page_nbytes,
            block_size: replica.block_size,
            max_num_seqs: replica.max_num_seqs,
            max_batched_tokens: replica.max_batched_tokens,
            max_prefill_tokens: replica.max_prefill_tokens.unwrap_or(usize::MAX),
            min_prefill_tokens: replica.min_prefill_tokens.unwrap_or(usize::MAX),
            max_running_adapter_pages: replica
                .max_running_adapter_nbytes
                .map_or(usize::MAX, |nbytes| {
                    (nbytes / replica.page_nbytes.max(1)).max(1)
                }),
            max_model_len: replica.max_model_len,
            prefix_caching: replica.prefix_caching,
            max_num_slots: replica.max_num_slots,
            ..SchedulerConfig::default()
        },
        costs: Arc::new(costs),
        loading: sim::Loading {
            lanes: loading.lanes,
            latency_s: loading.latency_s,
            bytes_per_s: loading.bytes_per_s,
            rest_s_per_byte: loading.rest_s_per_byte,
            max_open_at_rest: loading.max_open_at_rest,
        },
        runs_ahead: replica.runs_ahead,
        flow_by_adapter: replica.flow_by_adapter,
        max_waiting: replica.max_waiting.unwrap_or(usize::MAX),
    };
    Ok(sim::FleetConfig {
        replica,
        num_replicas: fleet.num_replicas,
        policy,
        spill: sim::Spill {
            factor: fleet.spill_factor,
            slack: fleet.spill_slack,
            resident_s: fleet.resident_s,
        },
        router_interval_s: fleet.router_interval_s,
        num_threads: fleet.num_threads,
    })
}

/// What came of each request, and of each replica.
#[pyclass(frozen, module = "loraserve._core")]
pub struct Simulated {
    outcomes: Vec<sim::Outcome>,
    gaps: sim::Histogram,
    replicas: Vec<sim::ReplicaCounts>,
}

type Counts = (u64, u64, f64, u64, u64, u64, u64, usize, f64, f64);

#[pymethods]
impl Simulated {
    #[getter]
    fn first_token_s<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f64>> {
        self.of_each(py, |outcome| outcome.first_token_s)
    }

    #[getter]
    fn end_s<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f64>> {
        self.of_each(py, |outcome| outcome.end_s)
    }

    #[getter]
    fn replica<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u32>> {
        self.of_each(py, |outcome| outcome.replica)
    }

    #[getter]
    fn cached_tokens<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<u32>> {
        self.of_each(py, |outcome| outcome.cached_tokens)
    }

    #[getter]
    fn was_resident<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<bool>> {
        self.of_each(py, |outcome| outcome.was_resident)
    }

    #[getter]
    fn is_refused<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<bool>> {
        self.of_each(py, |outcome| outcome.is_refused)
    }

    #[getter]
    fn num_gaps(&self) -> u64 {
        self.gaps.count()
    }

    #[getter]
    fn mean_gap_s(&self) -> Option<f64> {
        self.gaps.mean_s()
    }

    fn gap_s(&self, share: f64) -> Option<f64> {
        self.gaps.quantile_s(share)
    }

    #[getter]
    fn replicas(&self) -> Vec<Counts> {
        let counts = self.replicas.iter().map(|counts| {
            (
                counts.num_steps,
                counts.num_tokens,
                counts.busy_s,
                counts.num_loads,
                counts.loaded_nbytes,
                counts.num_evictions,
                counts.num_preemptions,
                counts.peak_waiting,
                counts.kv_pages,
                counts.adapter_pages,
            )
        });
        counts.collect()
    }
}

impl Simulated {
    fn of_each<'py, T: numpy::Element>(
        &self,
        py: Python<'py>,
        field: impl Fn(&sim::Outcome) -> T,
    ) -> Bound<'py, PyArray1<T>> {
        let values: Vec<T> = self.outcomes.iter().map(field).collect();
        values.into_pyarray(py)
    }
}

#[pyfunction]
#[pyo3(signature = (*, costs, loading, replica, fleet, arrivals, adapter_nbytes))]
#[expect(clippy::needless_pass_by_value, reason = "what pyo3 extracts")]
fn simulate(
    py: Python<'_>,
    costs: Costs,
    loading: Loading,
    replica: Replica,
    fleet: Fleet,
    arrivals: Arrivals<'_>,
    adapter_nbytes: Vec<u64>,
) -> PyResult<Simulated> {
    let workload = arrivals.read(adapter_nbytes)?;
    let config = config(costs, &loading, &replica, &fleet)?;
    let fleet = sim::Fleet::new(config, workload).map_err(of_sim)?;
    let result = py.detach(|| fleet.run());
    Ok(Simulated {
        outcomes: result.outcomes,
        gaps: result.gaps,
        replicas: result.replicas,
    })
}

#[pyfunction]
fn routing_policies() -> Vec<&'static str> {
    sim::Policy::ALL.iter().map(|&(name, _)| name).collect()
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Simulated>()?;
    m.add_function(wrap_pyfunction!(simulate, m)?)?;
    m.add_function(wrap_pyfunction!(routing_policies, m)?)
}
