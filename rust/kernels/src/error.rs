//! Everything the kernels refuse, told once.

use thiserror::Error;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum KernelError {
    #[error(
        "unknown CPU ISA {0:?}, known are amx, avx512bf16, avx512vnni, avx512, avxvnni, avx2, portable"
    )]
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

/// Refuses what has nothing in it.
pub fn check_not_empty(has_some: bool, what: &str) -> Result<(), KernelError> {
    if has_some {
        return Ok(());
    }
    Err(KernelError::Invalid(format!("{what} is empty")))
}

/// Refuses a value outside `0..limit`.
pub fn check_below(what: &'static str, value: i64, limit: i64) -> Result<(), KernelError> {
    if (0..limit).contains(&value) {
        return Ok(());
    }
    Err(KernelError::OutOfRange { what, value, limit })
}

/// Refuses a range that ends beyond `limit`, or beyond what a number can hold; returns its end.
pub fn check_end(
    what: &'static str,
    start: usize,
    len: usize,
    limit: usize,
) -> Result<usize, KernelError> {
    start
        .checked_add(len)
        .filter(|&end| end <= limit)
        .ok_or_else(|| KernelError::Invalid(format!("{what} is {start} + {len}, limit is {limit}")))
}

/// Multiplies sizes; refuses a product that no number can hold.
pub fn check_product(what: &'static str, sizes: &[usize]) -> Result<usize, KernelError> {
    let product = sizes
        .iter()
        .try_fold(1_usize, |product, &size| product.checked_mul(size));
    product
        .ok_or_else(|| KernelError::Invalid(format!("{what} overflows, its sizes are {sizes:?}")))
}
