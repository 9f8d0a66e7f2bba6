//! How many tokens of prompts a step computes, and whose.
//!
//! Where products are bound by arithmetic a step takes as long as it has rows, whoever's they are, and long prompts in one
//! piece stop everybody's tokens. Pieces cost nothing as long as a step has some hundred rows. Beside sequences that decode
//! their own flows' prompts are therefore given about twice their rows, so that a step is three times as long as its decodes
//! alone. A flow of which nothing decodes delays others only, and what it may have is decided by its turn: its prompt is not
//! made to wait behind more steps than it needs.

use std::collections::BTreeSet;

use super::{Plan, Scheduler};
use crate::ids::FlowId;

/// Tokens of prompts for each sequence that decodes in the step.
const TOKENS_PER_DECODE: usize = 2;

/// What is left of a step for prompts.
#[derive(Debug, Default)]
pub(super) struct PrefillRoom {
    num_tokens: usize,
    /// Of these, for flows that decode.
    num_beside: usize,
    decoding: BTreeSet<FlowId>,
}

impl PrefillRoom {
    /// Most tokens of a prompt of this flow.
    pub(super) fn of(&self, flow: FlowId) -> usize {
        if self.decoding.contains(&flow) {
            self.num_tokens.min(self.num_beside)
        } else {
            self.num_tokens
        }
    }

    pub(super) fn take(&mut self, num_tokens: usize) {
        self.num_tokens -= num_tokens;
        self.num_beside = self.num_beside.saturating_sub(num_tokens);
    }
}

impl Scheduler {
    /// Of a plan with decodes only.
    pub(super) fn prefill_room(&self, plan: &Plan) -> PrefillRoom {
        let flows = plan
            .rows
            .iter()
            .map(|&(index, _)| self.running[index].sequence.request.flow);
        let beside = self
            .config
            .min_prefill_tokens
            .max(TOKENS_PER_DECODE * plan.rows.len());
        PrefillRoom {
            num_tokens: plan.budget.min(self.config.max_prefill_tokens),
            num_beside: beside,
            decoding: flows.collect(),
        }
    }
}
