//! Rows of a quantised weight filled on every core.

use std::num::NonZero;
use std::thread;

use super::{QuantFormat, QuantizedWeight};
use crate::KernelError;
use crate::error::check_product;

/// Values below which a thread of its own is not worth its start.
const VALUES_PER_THREAD: usize = 1 << 16;

/// One row to fill: values [K], scales [K / group], minimums [K / group] or nothing; all zero before.
pub(super) struct RowMut<'a> {
    pub quants: &'a mut [u8],
    pub scales: &'a mut [f32],
    pub mins: &'a mut [f32],
}

/// A weight whose row n is what `fill(n, …)` makes of it; the first error of any row is returned.
pub(super) fn filled(
    format: QuantFormat,
    in_features: usize,
    out_features: usize,
    fill: impl Fn(usize, RowMut<'_>) -> Result<(), KernelError> + Sync,
) -> Result<QuantizedWeight, KernelError> {
    format.check_shape(in_features, out_features)?;
    let num_values = check_product("weight", &[in_features, out_features])?;
    let num_groups = in_features / format.group;
    let num_mins = if format.has_mins { num_groups } else { 0 };
    let mut quants = vec![0; num_values];
    let mut scales = vec![0.0; num_groups * out_features];
    let mut mins = vec![0.0; num_mins * out_features];

    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let num_threads = cores.min(num_values.div_ceil(VALUES_PER_THREAD));
    let rows_each = out_features.div_ceil(num_threads);
    let fill_rows = |first: usize, quants: &mut [u8], scales: &mut [f32], mins: &mut [f32]| {
        let mut mins = mins;
        let rows = quants.chunks_exact_mut(in_features);
        for (row, (quants, scales)) in rows.zip(scales.chunks_exact_mut(num_groups)).enumerate() {
            let (of_row, rest) = mins.split_at_mut(num_mins);
            mins = rest;
            let row_mut = RowMut {
                quants,
                scales,
                mins: of_row,
            };
            fill(first + row, row_mut)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let mut left = (&mut quants[..], &mut scales[..], &mut mins[..]);
        let mut threads = Vec::new();
        for first in (0..out_features).step_by(rows_each) {
            let count = rows_each.min(out_features - first);
            let (quants, rest_of_quants) = left.0.split_at_mut(count * in_features);
            let (scales, rest_of_scales) = left.1.split_at_mut(count * num_groups);
            let (mins, rest_of_mins) = left.2.split_at_mut(count * num_mins);
            left = (rest_of_quants, rest_of_scales, rest_of_mins);
            let fill_rows = &fill_rows;
            threads.push(scope.spawn(move || fill_rows(first, quants, scales, mins)));
        }
        let results = threads.into_iter().map(|thread| {
            thread
                .join()
                .expect("invariant: filling a row does not panic")
        });
        results.collect::<Result<(), KernelError>>()
    })?;
    QuantizedWeight::new(format, in_features, out_features, quants, scales, mins)
}
