//! `Weights`: how often a seed does each operation; some never.

use super::Rng;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Submit,
    /// A request that takes the pool to the last page, or asks for one more.
    SubmitTight,
    Finish,
    Register,
    Replace,
    Unregister,
    Warm,
    Pin,
    LoadSucceeds,
    LoadFails,
    LoadIsLate,
    Schedule,
    ScheduleAhead,
    Commit,
    /// Guesses from outside, some or all of them right.
    GiveDraft,
    /// Steps until everything has ended that no stuck load stands in the way of.
    Settle,
}

/// What a seed can't do without, else nothing happens at all.
const NEEDED: [(Operation, usize); 3] = [
    (Operation::Submit, 40),
    (Operation::Schedule, 50),
    (Operation::Commit, 40),
];

const OPTIONAL: [(Operation, usize); 13] = [
    (Operation::SubmitTight, 6),
    (Operation::Finish, 10),
    (Operation::Register, 6),
    (Operation::Replace, 6),
    (Operation::Unregister, 5),
    (Operation::Warm, 3),
    (Operation::Pin, 3),
    (Operation::LoadSucceeds, 20),
    (Operation::LoadFails, 6),
    (Operation::LoadIsLate, 6),
    (Operation::ScheduleAhead, 30),
    (Operation::Settle, 1),
    (Operation::GiveDraft, 40),
];

#[derive(Debug)]
pub struct Weights {
    weights: Vec<(Operation, usize)>,
    sum: usize,
}

impl Weights {
    pub fn draw(rng: &mut Rng) -> Self {
        let mut weights = Vec::new();
        for (operation, usual) in NEEDED {
            weights.push((operation, usual * [1, 1, 2, 4][rng.range(0, 3)]));
        }
        for (operation, usual) in OPTIONAL {
            weights.push((operation, usual * [0, 1, 1, 1, 2, 8][rng.range(0, 5)]));
        }
        let sum = weights.iter().map(|&(_, weight)| weight).sum();
        Self { weights, sum }
    }

    pub fn pick(&self, rng: &mut Rng) -> Operation {
        let mut drawn = rng.range(0, self.sum - 1);
        for &(operation, weight) in &self.weights {
            if drawn < weight {
                return operation;
            }
            drawn -= weight;
        }
        unreachable!("a draw is below the sum of the weights")
    }
}
