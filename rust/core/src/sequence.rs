//! A sequence: a request and its tokens so far. `Waiting` holds no memory; `Running` owns pages and uses slots.

use std::ops::Range;

use crate::ids::{Applied, SlotId};
use crate::memory::BlockTable;
use crate::request::{FinishReason, Request, RequestOutput};
use crate::speculation::Speculation;

#[derive(Debug)]
pub struct Sequence {
    pub request: Request,
    /// Prompt, then what was generated.
    pub tokens: Vec<i32>,
    pub prompt_len: usize,
    /// The first token of the prompt whose row it is still to be given; `prompt_len` where there is none.
    pub next_row: usize,
    /// Tokens of the prompt up to here were counted as served, or came from the prefix cache.
    pub num_charged: usize,
    /// Whether it ran before; it may wait again since.
    pub was_admitted: bool,
    /// Whether it gave up its place to another flow.
    pub was_set_back: bool,
    /// Its guesses; none where it asked for none.
    pub speculation: Option<Speculation>,
}

#[derive(Debug)]
pub struct Waiting {
    pub sequence: Sequence,
    /// How many requests were admitted past this one.
    pub overtaken: usize,
    /// The `SlotTable::num_returns` at which it did not fit beside late loads.
    pub unfit_at: Option<u64>,
}

#[derive(Debug)]
pub struct Running {
    pub sequence: Sequence,
    pub overtaken: usize,
    /// Order of admission; unique, so it names this admission of the sequence.
    pub admitted: u64,
    pub table: BlockTable,
    /// Tokens whose KV is in the pages.
    pub num_computed: usize,
    pub in_flight: InFlightTokens,
    /// Guesses that the step in flight checks, computed behind its last token.
    pub draft: Vec<i32>,
    /// In wave order.
    pub adapters: Vec<Applied<SlotId>>,
}

/// What steps in flight do for a sequence.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InFlightTokens {
    /// Tokens they compute.
    num_tokens: usize,
    /// Tokens they sample.
    num_awaited: usize,
    /// Which sample of the last of them is this sequence's.
    sample: usize,
}

impl Sequence {
    /// Appends a sampled token and says whether it was the last.
    pub fn append(&mut self, token: i32) -> Option<FinishReason> {
        self.tokens.push(token);
        let num_generated = self.tokens.len() - self.prompt_len;
        let may_stop = num_generated >= self.request.min_tokens;
        if may_stop && self.request.stop_token_ids.contains(&token) {
            Some(FinishReason::Stop)
        } else if num_generated >= self.request.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    /// Whether tokens are sampled for it, or it ends with its prompt.
    pub fn generates(&self) -> bool {
        self.request.max_tokens > 0
    }

    /// How many of its tokens may come from the prefix cache: who wants rows has to compute them.
    pub fn max_cached_tokens(&self) -> usize {
        if self.next_row < self.prompt_len {
            self.next_row
        } else {
            self.tokens.len()
        }
    }

    /// Tokens of the prompt in a range of tokens to be computed that were not counted before, counted now.
    pub fn charge_prompt(&mut self, computed: Range<usize>) -> usize {
        let end = computed.end.min(self.prompt_len);
        let num_new = end.saturating_sub(computed.start.max(self.num_charged));
        self.num_charged = self.num_charged.max(end);
        num_new
    }

    /// Tokens that it may still be given; a sequence that runs and generates has one or more.
    pub fn num_left(&self) -> usize {
        self.request.max_tokens - (self.tokens.len() - self.prompt_len)
    }

    pub fn output(&self, token: Option<i32>, finish: Option<FinishReason>) -> RequestOutput {
        RequestOutput {
            request: self.request.id,
            token,
            finish,
        }
    }
}

impl Running {
    /// Tokens known or being sampled.
    pub fn num_tokens(&self) -> usize {
        self.sequence.tokens.len() + self.in_flight.num_awaited
    }

    /// Tokens computed, or being computed.
    pub fn num_scheduled(&self) -> usize {
        self.num_computed + self.in_flight.num_tokens
    }

    /// Which sample of the step in flight its last token is, if that is not known yet.
    pub fn awaited(&self) -> Option<usize> {
        (self.in_flight.num_awaited > 0).then_some(self.in_flight.sample)
    }

    /// Tokens that no step has computed or computes; a decoding sequence has one.
    pub fn num_pending(&self) -> usize {
        self.num_tokens() - self.num_scheduled()
    }

    /// A step begins with `num_tokens` of its tokens; `sample` says which of the step's samples is the next token.
    pub fn launch(&mut self, num_tokens: usize, sample: Option<usize>) {
        self.in_flight.num_tokens += num_tokens;
        if let Some(sample) = sample {
            self.in_flight.num_awaited += 1;
            self.in_flight.sample = sample;
        }
    }

    /// The first step in flight that was launched with it has ended.
    pub fn land(&mut self, num_tokens: usize, samples: bool) {
        self.in_flight.num_tokens -= num_tokens;
        self.in_flight.num_awaited -= usize::from(samples);
        self.num_computed += num_tokens;
    }

    pub fn is_decoding(&self) -> bool {
        self.num_pending() == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{FlowId, PrefixIdentity, RequestId};

    fn sequence(min_tokens: usize, max_tokens: usize) -> Sequence {
        let request = Request {
            id: RequestId(0),
            flow: FlowId(0),
            adapters: Vec::new(),
            identity: PrefixIdentity::default(),
            max_tokens,
            min_tokens,
            stop_token_ids: vec![7],
        };
        Sequence {
            request,
            tokens: vec![7],
            prompt_len: 1,
            next_row: 1,
            num_charged: 0,
            was_admitted: false,
            was_set_back: false,
            speculation: None,
        }
    }

    #[test]
    fn stop_token_counts_only_once_min_tokens_are_generated() {
        let mut sequence = sequence(2, 5);
        assert_eq!(sequence.append(7), None);
        assert_eq!(sequence.append(7), Some(FinishReason::Stop));
    }

    #[test]
    fn tokens_of_a_prompt_are_charged_once() {
        let mut sequence = Sequence {
            tokens: vec![1; 12],
            prompt_len: 10,
            ..sequence(0, 5)
        };
        assert_eq!(sequence.charge_prompt(2..6), 4);
        assert_eq!(sequence.charge_prompt(0..8), 2);
        assert_eq!(sequence.charge_prompt(8..12), 2);
        assert_eq!(sequence.charge_prompt(0..12), 0);
    }

    #[test]
    fn max_tokens_ends_the_sequence_and_stop_takes_precedence() {
        let mut long = sequence(0, 2);
        assert_eq!(long.append(1), None);
        assert_eq!(long.append(1), Some(FinishReason::Length));
        assert_eq!(sequence(0, 1).append(7), Some(FinishReason::Stop));
    }
}
