//! `Workload`: who asks for what, and when; and how large the adapters are.

use crate::error::Error;

/// One request; its tokens are made up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Arrival {
    /// From the start of the simulation.
    pub at_s: f64,
    /// None is the base model.
    pub adapter: Option<u32>,
    pub prompt_tokens: u32,
    pub answer_tokens: u32,
    /// Requests of one adapter with equal prefixes begin with the same `prefix_tokens` tokens.
    pub prefix: u32,
    pub prefix_tokens: u32,
}

/// Bytes of adapter `id`, of any id: sizes take turns.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapters {
    sizes: Vec<u64>,
}

impl Adapters {
    pub fn new(sizes: Vec<u64>) -> Self {
        Self { sizes }
    }

    pub fn nbytes(&self, adapter: u32) -> u64 {
        self.sizes[adapter as usize % self.sizes.len()]
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Workload {
    arrivals: Vec<Arrival>,
    pub adapters: Adapters,
}

impl Workload {
    pub fn new(arrivals: Vec<Arrival>, adapters: Adapters) -> Result<Self, Error> {
        let mut before_s = 0.0;
        for (index, arrival) in arrivals.iter().enumerate() {
            let seconds = arrival.at_s;
            if !(seconds.is_finite() && seconds >= before_s) {
                return Err(Error::BadArrival { index, seconds });
            }
            before_s = seconds;
            if arrival.prompt_tokens == 0 || arrival.answer_tokens == 0 {
                return Err(Error::EmptyRequest {
                    index,
                    prompt_tokens: arrival.prompt_tokens,
                    answer_tokens: arrival.answer_tokens,
                });
            }
        }
        if adapters.sizes.is_empty() && arrivals.iter().any(|a| a.adapter.is_some()) {
            return Err(Error::NoAdapters);
        }
        Ok(Self { arrivals, adapters })
    }

    pub fn arrivals(&self) -> &[Arrival] {
        &self.arrivals
    }
}

/// The tokens of request `index`: those of its prefix, then its own, which no other request has.
pub fn prompt(index: usize, arrival: &Arrival) -> Vec<i32> {
    let num_shared = arrival.prefix_tokens.min(arrival.prompt_tokens) as usize;
    let mut tokens = vec![token_of_prefix(arrival.prefix); num_shared];
    tokens.resize(arrival.prompt_tokens as usize, token_of(index));
    tokens
}

/// The token that request `index` consists of.
pub fn token_of(index: usize) -> i32 {
    index as i32 & 0x3fff_ffff
}

fn token_of_prefix(prefix: u32) -> i32 {
    0x4000_0000 | (prefix & 0x3fff_ffff) as i32
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARRIVAL: Arrival = Arrival {
        at_s: 1.0,
        adapter: Some(0),
        prompt_tokens: 4,
        answer_tokens: 1,
        prefix: 7,
        prefix_tokens: 3,
    };

    #[test]
    fn prompts_share_their_prefix_and_nothing_else() {
        let (a, b) = (prompt(0, &ARRIVAL), prompt(1, &ARRIVAL));
        assert_eq!(a[..3], b[..3]);
        assert_ne!(a[3], b[3]);
        let other = Arrival {
            prefix: 8,
            ..ARRIVAL
        };
        assert_ne!(prompt(0, &other)[0], a[0]);
        assert!(a.iter().all(|&token| token >= 0));
    }

    #[test]
    fn sizes_take_turns() {
        let adapters = Adapters::new(vec![3, 5]);
        assert_eq!([0, 1, 1_000_000].map(|id| adapters.nbytes(id)), [3, 5, 3]);
    }

    #[test]
    fn what_cannot_arrive_is_refused() {
        let sizes = Adapters::new(vec![1]);
        for (arrivals, adapters, expected) in [
            (
                vec![
                    ARRIVAL,
                    Arrival {
                        at_s: 0.5,
                        ..ARRIVAL
                    },
                ],
                sizes.clone(),
                "arrival 1 is at 0.5 s, arrivals must be in order of time, finite, from 0 on",
            ),
            (
                vec![Arrival {
                    answer_tokens: 0,
                    ..ARRIVAL
                }],
                sizes,
                "request 0 has 4 tokens of prompt and 0 of answer, both must be at least 1",
            ),
            (
                vec![ARRIVAL],
                Adapters::new(Vec::new()),
                "requests name adapters, and no adapter has bytes",
            ),
        ] {
            let refused = Workload::new(arrivals, adapters).unwrap_err();
            assert_eq!(refused.to_string(), expected);
        }
    }
}
