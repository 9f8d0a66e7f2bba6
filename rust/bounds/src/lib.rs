//! How much a body from outside would become, told from its bytes before anything is made of them; no unsafe.

#![forbid(unsafe_code)]

pub mod json;
pub mod protobuf;
