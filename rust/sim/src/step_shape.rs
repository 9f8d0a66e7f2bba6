//! `StepShape`: what of a step's work its time depends on.

/// The arrays of a batch that a step's shape is made of, as `loraserve_core::Batch` has them.
#[derive(Debug, Clone, Copy)]
pub struct StepArrays<'a> {
    pub query_indptr: &'a [i32],
    pub context_lens: &'a [i32],
    pub num_samples: usize,
    pub num_prefill_tokens: usize,
    pub seg_start: &'a [i32],
    pub seg_end: &'a [i32],
    pub seg_slot: &'a [i32],
}

/// Amounts of work in a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepShape {
    /// Tokens computed.
    pub rows: f64,
    /// Rows whose logits are computed.
    pub samples: f64,
    /// Pairs of a prompt's token and a token that it attends to, itself included.
    pub prompt_pairs: f64,
    /// Tokens in the KV cache that decoding rows attend to.
    pub context_tokens: f64,
    /// Pages of the distinct adapters in the step, in bytes.
    pub adapter_nbytes: f64,
    /// Rows that an adapter acts on, once for each.
    pub adapter_rows: f64,
    /// Runs of neighbouring rows with one adapter.
    pub segments: f64,
    /// Adapters being loaded when the step begins.
    pub loads: f64,
}

impl StepShape {
    /// Without `adapter_nbytes` and `loads`, which no batch knows; and the distinct slots in it, ascending.
    pub fn of(arrays: StepArrays<'_>) -> (Self, Vec<i32>) {
        let num_tokens = arrays.query_indptr.last().copied().unwrap_or(0);
        let first_prefill = num_tokens - arrays.num_prefill_tokens as i32;
        let (mut prompt_pairs, mut context_tokens) = (0.0, 0.0);
        for (bounds, &end) in arrays.query_indptr.windows(2).zip(arrays.context_lens) {
            if bounds[0] < first_prefill {
                context_tokens += f64::from(end);
            } else {
                let num_new = f64::from(bounds[1] - bounds[0]);
                prompt_pairs += num_new * (f64::from(end) - (num_new - 1.0) / 2.0);
            }
        }
        let lengths = arrays.seg_start.iter().zip(arrays.seg_end);
        let mut slots = arrays.seg_slot.to_vec();
        slots.sort_unstable();
        slots.dedup();
        let shape = Self {
            rows: f64::from(num_tokens),
            samples: arrays.num_samples as f64,
            prompt_pairs,
            context_tokens,
            adapter_rows: lengths.map(|(start, end)| f64::from(end - start)).sum(),
            segments: arrays.seg_slot.len() as f64,
            ..Self::default()
        };
        (shape, slots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoding_rows_read_contexts_and_prompts_make_pairs() {
        let (shape, slots) = StepShape::of(StepArrays {
            query_indptr: &[0, 1, 2, 6],
            context_lens: &[10, 20, 7],
            num_samples: 2,
            num_prefill_tokens: 4,
            seg_start: &[0, 2, 5],
            seg_end: &[1, 5, 6],
            seg_slot: &[5, 3, 5],
        });
        let expected = StepShape {
            rows: 6.0,
            samples: 2.0,
            prompt_pairs: 4.0 + 5.0 + 6.0 + 7.0,
            context_tokens: 30.0,
            adapter_rows: 5.0,
            segments: 3.0,
            ..StepShape::default()
        };
        assert_eq!((shape, slots), (expected, vec![3, 5]));
    }
}
