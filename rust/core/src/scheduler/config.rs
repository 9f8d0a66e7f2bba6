//! `SchedulerConfig`: the limits a scheduler works within, validated once.

use crate::error::Error;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerConfig {
    pub num_pages: usize,
    pub page_nbytes: usize,
    /// Tokens a page holds.
    pub block_size: usize,
    pub max_num_seqs: usize,
    /// Tokens computed in a step.
    pub max_batched_tokens: usize,
    /// Of these, tokens of prompts.
    pub max_prefill_tokens: usize,
    /// Beside sequences that decode prompts of their flows take this many tokens of a step, or twice as many as decode.
    pub min_prefill_tokens: usize,
    /// Pages of all adapters of running sequences together, each counted once; a larger one runs beside no other.
    pub max_running_adapter_pages: usize,
    /// Prompt and generated tokens of a sequence.
    pub max_model_len: usize,
    pub prefix_caching: bool,
    /// Adapters resident or loading at once, however small they are.
    pub max_num_slots: usize,
    /// How often a request whose adapter is loading lets a later one go first, unless the load is late.
    pub max_overtakes: usize,
    /// How many waiting requests a step looks at, beside those that wait for late loads.
    pub lookahead: usize,
    /// Tokens guessed at most of a sequence in a step; 0 guesses none.
    pub max_draft_tokens: usize,
    /// Guesses fill a step up to this many tokens: in a larger one they would take others' time.
    pub max_drafted_step: usize,
}

impl Default for SchedulerConfig {
    fn default() -> Self {
        Self {
            num_pages: 1024,
            page_nbytes: 1 << 20,
            block_size: 16,
            max_num_seqs: 256,
            max_batched_tokens: 2048,
            max_prefill_tokens: usize::MAX,
            min_prefill_tokens: usize::MAX,
            max_running_adapter_pages: usize::MAX,
            max_model_len: 8192,
            prefix_caching: true,
            max_num_slots: i32::MAX as usize,
            max_overtakes: 64,
            lookahead: 64,
            max_draft_tokens: 0,
            max_drafted_step: 16,
        }
    }
}

impl SchedulerConfig {
    pub fn validate(&self) -> Result<(), Error> {
        /// Token slots are numbered in device arrays of i32.
        const MAX: usize = i32::MAX as usize;
        let ranges = [
            ("block_size", self.block_size, 1, 4096),
            ("num_pages", self.num_pages, 2, MAX / self.block_size.max(1)),
            ("page_nbytes", self.page_nbytes, 1, MAX),
            ("max_num_seqs", self.max_num_seqs, 1, MAX),
            ("max_batched_tokens", self.max_batched_tokens, 1, MAX),
            ("max_prefill_tokens", self.max_prefill_tokens, 1, usize::MAX),
            ("min_prefill_tokens", self.min_prefill_tokens, 1, usize::MAX),
            (
                "max_running_adapter_pages",
                self.max_running_adapter_pages,
                1,
                usize::MAX,
            ),
            ("max_model_len", self.max_model_len, 2, MAX),
            ("max_num_slots", self.max_num_slots, 1, MAX),
            ("lookahead", self.lookahead, 1, MAX),
        ];
        for (setting, value, low, high) in ranges {
            if !(low..=high).contains(&value) {
                return Err(Error::BadSetting {
                    setting,
                    value,
                    low,
                    high,
                });
            }
        }
        Ok(())
    }

    pub fn pool_nbytes(&self) -> usize {
        self.num_pages * self.page_nbytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_range_are_named_with_their_limits() {
        let config = SchedulerConfig {
            num_pages: 0,
            ..SchedulerConfig::default()
        };
        let message = config.validate().unwrap_err().to_string();
        assert_eq!(
            message,
            "num_pages is 0, it must be between 2 and 134217727"
        );
        assert_eq!(SchedulerConfig::default().validate(), Ok(()));
    }
}
