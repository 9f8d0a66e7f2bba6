//! What the scheduler counts, as Python reads it: `SchedulerStats`, `AdapterStats` for each name, `FlowStats` for each flow.

use loraserve_core as core;
use pyo3::prelude::*;

/// Present load and counts since start.
#[pyclass(frozen, get_all, module = "loraserve._core")]
#[expect(clippy::struct_field_names, reason = "all are counts")]
pub struct SchedulerStats {
    num_running: usize,
    num_waiting: usize,
    num_waiting_for_adapters: usize,
    num_registered_adapters: usize,
    num_resident_adapters: usize,
    num_pages: usize,
    num_free_pages: usize,
    num_kv_pages: usize,
    num_adapter_pages: usize,
    num_pinned_pages: usize,
    num_cached_pages: usize,
    num_adapter_loads: u64,
    num_adapter_evictions: u64,
    num_preemptions: u64,
    num_prefix_hit_tokens: u64,
    num_draft_tokens: u64,
    num_accepted_tokens: u64,
}

impl From<core::SchedulerStats> for SchedulerStats {
    fn from(stats: core::SchedulerStats) -> Self {
        Self {
            num_running: stats.num_running,
            num_waiting: stats.num_waiting,
            num_waiting_for_adapters: stats.num_waiting_for_adapters,
            num_registered_adapters: stats.num_registered_adapters,
            num_resident_adapters: stats.num_resident_adapters,
            num_pages: stats.num_pages,
            num_free_pages: stats.num_free_pages,
            num_kv_pages: stats.num_kv_pages,
            num_adapter_pages: stats.num_adapter_pages,
            num_pinned_pages: stats.num_pinned_pages,
            num_cached_pages: stats.num_cached_pages,
            num_adapter_loads: stats.num_adapter_loads,
            num_adapter_evictions: stats.num_adapter_evictions,
            num_preemptions: stats.num_preemptions,
            num_prefix_hit_tokens: stats.num_prefix_hit_tokens,
            num_draft_tokens: stats.num_draft_tokens,
            num_accepted_tokens: stats.num_accepted_tokens,
        }
    }
}

/// One registered name now, and its past.
#[pyclass(frozen, get_all, module = "loraserve._core")]
pub struct AdapterStats {
    name: String,
    id: u32,
    content_hash: String,
    nbytes: usize,
    state: &'static str,
    num_running: usize,
    num_waiting: usize,
    is_pinned: bool,
    num_loads: u64,
    num_load_failures: u64,
    num_evictions: u64,
    num_uninvoked: u64,
}

impl From<core::AdapterStats> for AdapterStats {
    fn from(stats: core::AdapterStats) -> Self {
        Self {
            name: stats.name,
            id: stats.id.0,
            content_hash: stats.content_hash.0.to_string(),
            nbytes: stats.nbytes,
            state: stats.state,
            num_running: stats.num_running,
            num_waiting: stats.num_waiting,
            is_pinned: stats.is_pinned,
            num_loads: stats.num_loads,
            num_load_failures: stats.num_load_failures,
            num_evictions: stats.num_evictions,
            num_uninvoked: stats.num_uninvoked,
        }
    }
}

/// Who shares the engine now, and what it was served.
#[pyclass(frozen, get_all, module = "loraserve._core")]
pub struct FlowStats {
    name: String,
    weight: f64,
    num_waiting: usize,
    num_running: usize,
    num_prompt_tokens: u64,
    num_generated_tokens: u64,
    lead: f64,
}

impl From<core::FlowStats> for FlowStats {
    fn from(stats: core::FlowStats) -> Self {
        Self {
            name: stats.name.to_string(),
            weight: stats.weight.value(),
            num_waiting: stats.num_waiting,
            num_running: stats.num_running,
            num_prompt_tokens: stats.served.num_prompt_tokens,
            num_generated_tokens: stats.served.num_generated_tokens,
            lead: stats.lead,
        }
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<SchedulerStats>()?;
    m.add_class::<AdapterStats>()?;
    m.add_class::<FlowStats>()
}
