//! `Loader`: adapters on their way into the pool, on a few lanes.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use loraserve_core::AdapterId;

use crate::error::Error;

/// The engine's: after this long requests of other adapters no longer wait for a load.
const LATE_LOAD_S: f64 = 1.0;

/// What a load takes: `latency_s + nbytes / bytes_per_s` of a lane, and while the model computes on the same cores a rest.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Loading {
    /// Loads at once.
    pub lanes: usize,
    pub latency_s: f64,
    /// Of each lane.
    pub bytes_per_s: f64,
    /// Of a load beside a step; open loads share it, and more than `max_open_at_rest` take none.
    pub rest_s_per_byte: f64,
    pub max_open_at_rest: usize,
}

impl Loading {
    pub fn validate(&self) -> Result<(), Error> {
        let checks = [
            ("lanes", self.lanes as f64, self.lanes > 0, "at least 1"),
            (
                "latency_s",
                self.latency_s,
                self.latency_s >= 0.0,
                "0 or more",
            ),
            (
                "bytes_per_s",
                self.bytes_per_s,
                self.bytes_per_s > 0.0,
                "more than 0",
            ),
            (
                "rest_s_per_byte",
                self.rest_s_per_byte,
                self.rest_s_per_byte >= 0.0,
                "0 or more",
            ),
        ];
        for (name, value, is_good, expected) in checks {
            if !is_good || !value.is_finite() {
                return Err(Error::BadValue {
                    name,
                    value,
                    expected,
                });
            }
        }
        Ok(())
    }
}

/// A load under way, ordered by its end and, of equal ones, by its start.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Load {
    ends_s: f64,
    number: u64,
    adapter: AdapterId,
}

impl Eq for Load {}

impl PartialOrd for Load {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Load {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.ends_s
            .total_cmp(&other.ends_s)
            .then(self.number.cmp(&other.number))
    }
}

#[derive(Debug)]
pub struct Loader {
    loading: Loading,
    /// When each lane is free.
    lanes: Vec<f64>,
    open: BinaryHeap<Reverse<Load>>,
    /// When each load is late, by its number, in order of start; ended ones may be among them.
    late: VecDeque<(f64, u64)>,
    num_started: u64,
}

impl Loader {
    pub fn new(loading: Loading) -> Self {
        Self {
            lanes: vec![0.0; loading.lanes],
            loading,
            open: BinaryHeap::new(),
            late: VecDeque::new(),
            num_started: 0,
        }
    }

    /// The lane that is free first takes it.
    pub fn start(&mut self, adapter: AdapterId, nbytes: f64, now_s: f64, beside_step: bool) {
        let Loading {
            latency_s,
            bytes_per_s,
            rest_s_per_byte,
            max_open_at_rest,
            ..
        } = self.loading;
        let num_open = self.open.len() + 1;
        let rests = beside_step && num_open <= max_open_at_rest;
        let rest_s = if rests {
            rest_s_per_byte * nbytes / num_open as f64
        } else {
            0.0
        };
        let lane = self.lanes.iter_mut().min_by(|a, b| a.total_cmp(b));
        let lane = lane.expect("invariant: there are lanes");
        *lane = lane.max(now_s) + latency_s + nbytes / bytes_per_s + rest_s;
        self.open.push(Reverse(Load {
            ends_s: *lane,
            number: self.num_started,
            adapter,
        }));
        self.late.push_back((now_s + LATE_LOAD_S, self.num_started));
        self.num_started += 1;
    }

    /// A load that has ended by then, in their order.
    pub fn take_ended(&mut self, now_s: f64) -> Option<AdapterId> {
        if self.next_end_s()? > now_s {
            return None;
        }
        self.open.pop().map(|Reverse(load)| load.adapter)
    }

    pub fn next_end_s(&self) -> Option<f64> {
        self.open.peek().map(|Reverse(load)| load.ends_s)
    }

    /// A load that is late by then and has not ended, each once.
    pub fn take_late(&mut self, now_s: f64) -> Option<AdapterId> {
        while let Some(&(late_s, number)) = self.late.front() {
            if late_s > now_s {
                return None;
            }
            self.late.pop_front();
            let mut open = self.open.iter();
            if let Some(Reverse(load)) = open.find(|load| load.0.number == number) {
                return Some(load.adapter);
            }
        }
        None
    }

    /// When `take_late` may have something to tell.
    pub fn next_late_s(&self) -> Option<f64> {
        self.late.front().map(|&(late_s, _)| late_s)
    }

    pub fn num_open(&self) -> usize {
        self.open.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOADING: Loading = Loading {
        lanes: 2,
        latency_s: 1.0,
        bytes_per_s: 10.0,
        rest_s_per_byte: 0.1,
        max_open_at_rest: 2,
    };

    #[test]
    fn loads_take_the_lane_that_is_free_first() {
        let mut loader = Loader::new(LOADING);
        for (id, nbytes) in [(0, 40.0), (1, 10.0), (2, 10.0)] {
            loader.start(AdapterId(id), nbytes, 0.0, false);
        }
        let mut ends = Vec::new();
        while let Some(end) = loader.next_end_s() {
            assert_eq!(loader.take_ended(end - 0.01), None);
            ends.push((loader.take_ended(end).unwrap().0, end));
        }
        assert_eq!(ends, [(1, 2.0), (2, 4.0), (0, 5.0)]);
    }

    #[test]
    fn loads_beside_steps_share_a_rest_and_many_take_none() {
        let mut loader = Loader::new(Loading {
            lanes: 9,
            ..LOADING
        });
        for id in 0..3 {
            loader.start(AdapterId(id), 10.0, 0.0, true);
        }
        assert_eq!(loader.lanes[..3], [3.0, 2.5, 2.0]);
        assert_eq!(loader.num_open(), 3);
    }

    #[test]
    fn a_load_is_late_once_and_not_after_its_end() {
        let mut loader = Loader::new(LOADING);
        loader.start(AdapterId(0), 30.0, 0.0, false);
        loader.start(AdapterId(1), 0.0, 0.0, false);
        assert_eq!(
            (loader.next_late_s(), loader.take_late(0.9)),
            (Some(1.0), None)
        );
        assert_eq!(loader.take_ended(1.0), Some(AdapterId(1)));
        assert_eq!(loader.take_late(1.0), Some(AdapterId(0)));
        assert_eq!((loader.take_late(9.0), loader.next_late_s()), (None, None));
    }

    #[test]
    fn a_loader_that_loads_nothing_is_refused() {
        for (loading, name) in [
            (
                Loading {
                    lanes: 0,
                    ..LOADING
                },
                "lanes is 0",
            ),
            (
                Loading {
                    bytes_per_s: 0.0,
                    ..LOADING
                },
                "bytes_per_s is 0",
            ),
            (
                Loading {
                    latency_s: f64::NAN,
                    ..LOADING
                },
                "latency_s is NaN",
            ),
        ] {
            let message = loading.validate().unwrap_err().to_string();
            assert!(message.starts_with(name), "{message}");
        }
    }
}
