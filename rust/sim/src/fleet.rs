//! `Fleet`: replicas behind a router.
//!
//! The router hears of ends every `router_interval_s`; in between it knows only what it has sent itself. So replicas meet
//! at these moments alone, and threads share them out: the result is the same with any number of threads.

use std::sync::{Arc, Mutex};
use std::thread;

use crate::error::Error;
use crate::histogram::Histogram;
use crate::replica::{Outcome, Replica, ReplicaConfig, ReplicaCounts};
use crate::router::{Policy, Router, Spill};
use crate::workload::Workload;

/// Replicas that a thread takes at once.
const CHUNK: usize = 8;

#[derive(Debug, Clone)]
pub struct FleetConfig {
    pub replica: ReplicaConfig,
    pub num_replicas: usize,
    pub policy: Policy,
    pub spill: Spill,
    pub router_interval_s: f64,
    pub num_threads: usize,
}

impl FleetConfig {
    fn validate(&self) -> Result<(), Error> {
        self.spill.validate()?;
        for (name, value, is_good) in [
            (
                "num_replicas",
                self.num_replicas as f64,
                self.num_replicas > 0,
            ),
            ("num_threads", self.num_threads as f64, self.num_threads > 0),
            (
                "router_interval_s",
                self.router_interval_s,
                self.router_interval_s > 0.0 && self.router_interval_s.is_finite(),
            ),
        ] {
            if !is_good {
                return Err(Error::BadValue {
                    name,
                    value,
                    expected: "more than 0",
                });
            }
        }
        Ok(())
    }
}

/// What came of a workload.
#[derive(Debug, Clone, PartialEq)]
pub struct FleetResult {
    /// Of each request, in their order.
    pub outcomes: Vec<Outcome>,
    /// Times between tokens.
    pub gaps: Histogram,
    pub replicas: Vec<ReplicaCounts>,
}

pub struct Fleet {
    config: FleetConfig,
    replicas: Vec<Replica>,
    router: Router,
    workload: Workload,
    outcomes: Vec<Option<Outcome>>,
}

impl Fleet {
    pub fn new(config: FleetConfig, workload: Workload) -> Result<Self, Error> {
        config.validate()?;
        let adapters = Arc::new(workload.adapters.clone());
        let numbers = 0..config.num_replicas as u32;
        let replicas =
            numbers.map(|number| Replica::new(number, config.replica.clone(), adapters.clone()));
        Ok(Self {
            replicas: replicas.collect::<Result<_, _>>()?,
            router: Router::new(config.policy, config.spill, config.num_replicas),
            outcomes: vec![None; workload.arrivals().len()],
            config,
            workload,
        })
    }

    /// Until every request has ended.
    pub fn run(mut self) -> FleetResult {
        let is_blind = self.config.policy.is_blind() || self.config.num_replicas == 1;
        let interval_s = self.config.router_interval_s;
        let mut next = 0;
        while next < self.outcomes.len() {
            let now_s = self.workload.arrivals()[next].at_s;
            if is_blind {
                next = self.route_until(next, f64::INFINITY);
                continue;
            }
            // Whole intervals, so that a quiet time is one advance.
            let num_passed = (now_s / interval_s).floor();
            self.advance(num_passed * interval_s);
            let until_s = (num_passed + 1.0) * interval_s;
            next = self.route_until(next, until_s.max(now_s.next_up()));
        }
        self.advance(f64::INFINITY);
        self.result()
    }

    /// Sends what arrives before `until_s`; the index behind.
    fn route_until(&mut self, first: usize, until_s: f64) -> usize {
        let arrivals = &self.workload.arrivals()[first..];
        for (offset, arrival) in arrivals.iter().enumerate() {
            if arrival.at_s >= until_s {
                return first + offset;
            }
            let replica = self.router.route(arrival);
            self.replicas[replica].arrive(first + offset, *arrival);
        }
        self.outcomes.len()
    }

    fn advance(&mut self, until_s: f64) {
        let chunks = Mutex::new(self.replicas.chunks_mut(CHUNK));
        let work = || {
            loop {
                let chunk = chunks.lock().expect("invariant: no thread panicked").next();
                let Some(chunk) = chunk else { return };
                for replica in chunk {
                    replica.advance(until_s);
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..self.config.num_threads.min(self.config.num_replicas) {
                scope.spawn(work);
            }
            work();
        });
        for (number, replica) in self.replicas.iter_mut().enumerate() {
            for (index, outcome) in replica.take_ended() {
                let before = self.outcomes[index].replace(outcome);
                assert!(before.is_none(), "invariant: request {index} ends once");
                let adapter = self.workload.arrivals()[index].adapter;
                self.router.end(number, adapter);
            }
        }
    }

    fn result(self) -> FleetResult {
        let mut gaps = Histogram::default();
        for replica in &self.replicas {
            assert!(replica.is_idle(), "invariant: every request ends");
            gaps.merge(replica.gaps());
        }
        let outcomes = self.outcomes.into_iter();
        FleetResult {
            outcomes: outcomes
                .map(|outcome| outcome.expect("invariant: every request ends"))
                .collect(),
            gaps,
            replicas: self.replicas.iter().map(Replica::counts).collect(),
        }
    }
}
