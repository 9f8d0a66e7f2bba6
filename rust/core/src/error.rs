//! What a caller can do wrong, or ask too much of; each names the value, the limit and the remedy.

use thiserror::Error;

#[derive(Debug, Clone, PartialEq, Error)]
pub enum Error {
    #[error("prompt is empty, at least one token is needed")]
    EmptyPrompt,
    #[error(
        "prompt has {tokens} tokens, limit is {limit}: the context length{}",
        if *generates { " less one token to generate" } else { "" }
    )]
    PromptTooLong {
        tokens: usize,
        limit: usize,
        generates: bool,
    },
    #[error("prompt token {index} is {token}, token ids start at 0")]
    NegativeToken { index: usize, token: i32 },
    #[error("max_tokens is 0, it must be at least 1")]
    ZeroMaxTokens,
    #[error("min_tokens is {min_tokens}, limit is max_tokens = {max_tokens}")]
    MinTokensTooLarge {
        min_tokens: usize,
        max_tokens: usize,
    },
    #[error("adapter '{name}' has weight {weight}, weights must be finite")]
    BadWeight { name: String, weight: f32 },
    #[error("weight of a flow is {weight}, it must be from {least} to {most}")]
    BadFlowWeight { weight: f64, least: f64, most: f64 },
    #[error("adapter '{name}' is named twice in one request, give it one weight")]
    AdapterNamedTwice { name: String },
    #[error(
        "the weights leave no adapter to run, so the base model would answer, which the caller may not use; give an adapter a weight"
    )]
    OnlyBaseModelLeft,
    #[error("adapter name '{name}' is not allowed, use letters, digits and _ - . : only")]
    BadAdapterName { name: String },
    #[error(
        "adapter '{name}' is registered with other content ({registered}), unload it before loading {offered}"
    )]
    AdapterNameTaken {
        name: String,
        registered: String,
        offered: String,
    },
    #[error("adapter {id} is not loading, a load is answered once")]
    NotLoading { id: u32 },
    #[error("{setting} is {value}, it must be between {low} and {high}")]
    BadSetting {
        setting: &'static str,
        value: usize,
        low: usize,
        high: usize,
    },
    #[error("no adapter named '{name}' is registered")]
    AdapterNotFound { name: String },
    #[error("adapter '{name}' is being unloaded and takes no new requests")]
    AdapterUnloading { name: String },
    #[error(
        "adapter '{name}' needs {needed} bytes ({needed_pages} pages) and a page for the KV cache, the pool has {available} bytes ({available_pages} pages); raise the memory budget"
    )]
    AdapterTooLarge {
        name: String,
        needed: usize,
        needed_pages: usize,
        available: usize,
        available_pages: usize,
    },
    #[error(
        "request needs {needed} bytes ({kv_pages} pages of KV cache, {adapter_pages} pages of adapters), the pool has {available} bytes ({available_pages} pages); lower max_tokens or raise the memory budget"
    )]
    RequestTooLarge {
        needed: usize,
        kv_pages: usize,
        adapter_pages: usize,
        available: usize,
        available_pages: usize,
    },
    #[error(
        "adapter '{name}' needs {needed_pages} pages of memory, pinned adapters may take {limit_pages} and take {pinned_pages}; unpin others or raise the memory budget"
    )]
    PinTooLarge {
        name: String,
        needed_pages: usize,
        pinned_pages: usize,
        limit_pages: usize,
    },
    #[error("adapter '{name}' can't be pinned, {limit} are pinned already; unpin one first")]
    TooManyPinned { name: String, limit: usize },
    #[error(
        "request needs {kv_pages} pages of KV cache and {adapter_pages} pages of adapters, {available_pages} are left beside pinned adapters; lower max_tokens or unpin some"
    )]
    NoRoomForRequest {
        kv_pages: usize,
        adapter_pages: usize,
        available_pages: usize,
    },
    #[error(
        "adapter '{name}' can't be pinned now, request {request} needs the memory: {kv_pages} pages of KV cache and {adapter_pages} of adapters; try again later"
    )]
    PinInTheWay {
        name: String,
        request: u64,
        kv_pages: usize,
        adapter_pages: usize,
    },
    #[error(
        "adapter '{name}' needs {needed_pages} pages of memory, pinned adapters leave {available_pages}; unpin some or raise the memory budget"
    )]
    NoRoomBesidePinned {
        name: String,
        needed_pages: usize,
        available_pages: usize,
    },
    #[error("request names {count} adapters, at most {limit} can be resident at once")]
    TooManyAdapters { count: usize, limit: usize },
}

/// The kinds of error that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    InvalidRequest,
    AdapterNotFound,
    AdapterUnavailable,
    Capacity,
    PermissionDenied,
}

impl Error {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::AdapterNotFound { .. } => ErrorKind::AdapterNotFound,
            Self::OnlyBaseModelLeft => ErrorKind::PermissionDenied,
            Self::AdapterUnloading { .. } => ErrorKind::AdapterUnavailable,
            Self::AdapterTooLarge { .. }
            | Self::RequestTooLarge { .. }
            | Self::PinTooLarge { .. }
            | Self::TooManyPinned { .. }
            | Self::NoRoomForRequest { .. }
            | Self::PinInTheWay { .. }
            | Self::NoRoomBesidePinned { .. }
            | Self::TooManyAdapters { .. } => ErrorKind::Capacity,
            _ => ErrorKind::InvalidRequest,
        }
    }
}
