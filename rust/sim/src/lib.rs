//! The scheduler on a clock of its own: what a stream of requests would find on one replica, or on a thousand.
//!
//! Nothing is computed. The scheduler and its memory are `loraserve-core` as it serves; how long a step takes is a cost
//! model's word, and how long an adapter takes to load is its bytes over a bandwidth.
#![forbid(unsafe_code)]

pub mod costs;
pub mod error;
pub mod fleet;
pub mod histogram;
pub mod loader;
pub mod replica;
pub mod router;
pub mod step_shape;
pub mod workload;

pub use costs::CostModel;
pub use error::Error;
pub use fleet::{Fleet, FleetConfig, FleetResult};
pub use histogram::Histogram;
pub use loader::Loading;
pub use replica::{Outcome, Replica, ReplicaConfig, ReplicaCounts};
pub use router::{Policy, Router, Spill};
pub use step_shape::{StepArrays, StepShape};
pub use workload::{Adapters, Arrival, Workload};
