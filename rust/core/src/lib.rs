//! The scheduler and the memory manager: which page, which slot, which token, which segment.
//!
//! Knows neither Python, nor CUDA, nor SIMD; holds indices, never bytes.
#![forbid(unsafe_code)]

pub mod adapter_cache;
pub mod answers;
pub mod batch;
pub mod error;
pub mod flows;
pub mod guesses;
pub mod ids;
pub mod memory;
pub mod ngram;
pub mod page_pool;
pub mod page_set;
pub mod prefix_cache;
pub mod request;
pub mod scheduler;
pub mod sequence;
pub mod slot_table;
pub mod speculation;

pub use adapter_cache::{AdapterContent, AdapterStats};
pub use batch::{Batch, HiddenSpan};
pub use error::{Error, ErrorKind};
pub use flows::{FlowStats, Served};
pub use ids::{AdapterId, AdapterKey, CacheScope, PageId, PrefixIdentity, RequestId, SlotId};
pub use request::{Failure, FinishReason, Flow, FlowWeight, NewRequest, PromptRows, RequestOutput};
pub use scheduler::{Admission, Load, Scheduler, SchedulerConfig, SchedulerOutput, SchedulerStats};
