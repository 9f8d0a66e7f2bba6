//! Every refusal of a simulation's input.

use loraserve_core as core;

#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Scheduler(#[from] core::Error),
    #[error("the cost of {name} is {value}, it must be finite and not negative")]
    BadCost { name: &'static str, value: f64 },
    #[error(
        "the costs of rows must be of ascending numbers of rows and not fall, {rows} rows cost {seconds} s"
    )]
    BadRows { rows: f64, seconds: f64 },
    #[error("the costs of rows are empty, at least one point is needed")]
    NoRows,
    #[error("{name} is {value}, it must be {expected}")]
    BadValue {
        name: &'static str,
        value: f64,
        expected: &'static str,
    },
    #[error(
        "arrival {index} is at {seconds} s, arrivals must be in order of time, finite, from 0 on"
    )]
    BadArrival { index: usize, seconds: f64 },
    #[error(
        "request {index} has {prompt_tokens} tokens of prompt and {answer_tokens} of answer, both must be at least 1"
    )]
    EmptyRequest {
        index: usize,
        prompt_tokens: u32,
        answer_tokens: u32,
    },
    #[error("requests name adapters, and no adapter has bytes")]
    NoAdapters,
}
