//! Everything the kernels refuse, told once.

use thiserror::Error;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum KernelError {
    #[error("unknown CPU ISA {0:?}, known are amx, avx512bf16, avx512, avx2, portable")]
    UnknownIsa(String),
    #[error("this CPU does not support {0:?}, the best it supports is {1:?}")]
    UnsupportedIsa(&'static str, &'static str),
    #[error("{what} is {value}, limit is {limit}")]
    OutOfRange {
        what: &'static str,
        value: i64,
        limit: i64,
    },
    #[error("{what} has length {value}, expected {expected}")]
    Length {
        what: &'static str,
        value: usize,
        expected: usize,
    },
    #[error("{0}")]
    Invalid(String),
}

/// Refuses a buffer or table of the wrong length.
pub fn check_length(what: &'static str, value: usize, expected: usize) -> Result<(), KernelError> {
    if value == expected {
        return Ok(());
    }
    Err(KernelError::Length {
        what,
        value,
        expected,
    })
}

/// Refuses a value outside `0..limit`.
pub fn check_below(what: &'static str, value: i64, limit: i64) -> Result<(), KernelError> {
    if (0..limit).contains(&value) {
        return Ok(());
    }
    Err(KernelError::OutOfRange { what, value, limit })
}
