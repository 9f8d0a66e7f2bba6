//! A batch on its way from Python's arrays to Rust's.

use loraserve_kernels::step_arrays::StepArrays;
use numpy::{Element, PyReadonlyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// Copies the arrays a batch has as attributes.
pub fn step_arrays(batch: &Bound<'_, PyAny>) -> PyResult<StepArrays> {
    let ints = |name: &str| array::<i32>(batch, name);
    Ok(StepArrays {
        token_ids: ints("token_ids")?,
        positions: ints("positions")?,
        slot_mapping: ints("slot_mapping")?,
        query_indptr: ints("query_indptr")?,
        context_lens: ints("context_lens")?,
        block_table: ints("block_table")?,
        block_table_indptr: ints("block_table_indptr")?,
        logits_indices: ints("logits_indices")?,
        wave_indptr: ints("wave_indptr")?,
        seg_start: ints("seg_start")?,
        seg_end: ints("seg_end")?,
        seg_slot: ints("seg_slot")?,
        seg_weight: array::<f32>(batch, "seg_weight")?,
    })
}

fn array<T: Element + Copy>(batch: &Bound<'_, PyAny>, name: &str) -> PyResult<Vec<T>> {
    let array: PyReadonlyArray1<'_, T> = batch
        .getattr(name)?
        .extract()
        .map_err(|_| PyValueError::new_err(format!("{name} is not an array of the step's type")))?;
    Ok(array.as_slice()?.to_vec())
}
