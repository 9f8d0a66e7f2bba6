//! Decode steps of any size made to fit a captured graph.

use crate::KernelError;
use crate::error::check_length;
use crate::step_arrays::StepArrays;

/// A decode step with rows added up to `padded_tokens`: sequences of one token and no context, whose
/// slot mapping is -1 and whose logits are sampled like the others.
pub(super) fn pad(
    arrays: &StepArrays,
    num_prefill_tokens: usize,
    padded_tokens: usize,
) -> Result<StepArrays, KernelError> {
    let num_tokens = arrays.token_ids.len();
    let num_extra = padded_tokens.checked_sub(num_tokens).ok_or_else(|| {
        KernelError::Invalid(format!(
            "step has {num_tokens} tokens, more than the {padded_tokens} to pad it to"
        ))
    })?;
    check_length("prefill tokens of a padded step", num_prefill_tokens, 0)?;
    check_length(
        "sequences of a padded step",
        arrays.context_lens.len(),
        num_tokens,
    )?;
    check_length(
        "sampled rows of a padded step",
        arrays.logits_indices.len(),
        num_tokens,
    )?;
    let mut padded = arrays.clone();
    let rows = num_tokens as i32..padded_tokens as i32;
    let num_blocks = arrays.block_table.len() as i32;
    padded.token_ids.resize(padded_tokens, 0);
    padded.positions.resize(padded_tokens, 0);
    padded.slot_mapping.resize(padded_tokens, -1);
    padded.context_lens.resize(padded_tokens, 0);
    padded.query_indptr.extend(rows.clone().map(|row| row + 1));
    padded
        .block_table_indptr
        .extend(std::iter::repeat_n(num_blocks, num_extra));
    padded.logits_indices.extend(rows);
    Ok(padded)
}
