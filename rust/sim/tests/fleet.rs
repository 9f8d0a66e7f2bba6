//! Whole simulations: every request ends once, nothing depends on threads, and what should help does.

use std::sync::Arc;

use loraserve_core::SchedulerConfig;
use loraserve_sim::{
    Adapters, Arrival, CostModel, Fleet, FleetConfig, FleetResult, Loading, Policy, ReplicaConfig,
    Spill, Workload,
};

const ADAPTER_NBYTES: u64 = 3 << 20;

fn replica() -> ReplicaConfig {
    ReplicaConfig {
        scheduler: SchedulerConfig {
            num_pages: 128,
            max_num_seqs: 16,
            max_batched_tokens: 256,
            max_model_len: 1024,
            ..SchedulerConfig::default()
        },
        costs: Arc::new(CostModel {
            rows: vec![(1.0, 5e-3), (64.0, 10e-3)],
            context_token: 1e-7,
            adapter_byte: 1e-10,
            ..CostModel::default()
        }),
        loading: Loading {
            lanes: 2,
            latency_s: 2e-3,
            bytes_per_s: 1e9,
            rest_s_per_byte: 0.0,
            max_open_at_rest: 0,
        },
        runs_ahead: false,
        flow_by_adapter: false,
        max_waiting: usize::MAX,
    }
}

fn fleet(policy: Policy, num_replicas: usize) -> FleetConfig {
    FleetConfig {
        replica: replica(),
        num_replicas,
        policy,
        spill: Spill::default(),
        router_interval_s: 0.05,
        num_threads: 2,
    }
}

/// Requests of few adapters often and of many seldom; every seventh on the base model, every fifth with a prefix.
fn workload(num_requests: u32, num_adapters: u32, per_s: f64) -> Workload {
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        random ^= random >> 12;
        random ^= random << 25;
        random ^= random >> 27;
        (random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 40) as u32
    };
    let arrivals = (0..num_requests).map(|index| {
        let (a, b) = (next() % num_adapters, next() % num_adapters);
        Arrival {
            at_s: f64::from(index) / per_s,
            adapter: (index % 7 > 0).then_some(a.min(b)),
            prompt_tokens: 1 + next() % 100,
            answer_tokens: 1 + next() % 40,
            prefix: next() % 3,
            prefix_tokens: if index % 5 == 0 { 48 } else { 0 },
        }
    });
    Workload::new(
        arrivals.collect(),
        Adapters::new(vec![ADAPTER_NBYTES, 1 << 20]),
    )
    .unwrap()
}

fn run(config: FleetConfig, workload: &Workload) -> FleetResult {
    Fleet::new(config, workload.clone()).unwrap().run()
}

fn mean_end_to_end(result: &FleetResult, workload: &Workload) -> f64 {
    let both = result.outcomes.iter().zip(workload.arrivals());
    both.map(|(outcome, arrival)| outcome.end_s - arrival.at_s)
        .sum::<f64>()
        / result.outcomes.len() as f64
}

#[test]
fn every_request_ends_once_after_it_came_and_with_all_its_tokens() {
    let workload = workload(2000, 200, 200.0);
    for (name, policy) in Policy::ALL {
        for runs_ahead in [false, true] {
            let mut config = fleet(policy, 5);
            config.replica.runs_ahead = runs_ahead;
            let result = run(config, &workload);
            assert_eq!(result.outcomes.len(), 2000, "{name}");
            for (outcome, arrival) in result.outcomes.iter().zip(workload.arrivals()) {
                assert!(!outcome.is_refused);
                assert!(outcome.first_token_s > arrival.at_s, "{name} {outcome:?}");
                let least_s = 5e-3 * f64::from(arrival.answer_tokens - 1);
                assert!(
                    outcome.end_s - outcome.first_token_s > least_s - 1e-9,
                    "{name}"
                );
            }
            let answers = workload
                .arrivals()
                .iter()
                .map(|a| u64::from(a.answer_tokens - 1));
            assert_eq!(result.gaps.count(), answers.sum::<u64>(), "{name}");
            let num_loads: u64 = result.replicas.iter().map(|r| r.num_loads).sum();
            assert!(num_loads >= 200, "{name}: {num_loads}");
        }
    }
}

#[test]
fn threads_and_repetition_change_nothing() {
    let workload = workload(1500, 300, 150.0);
    for (name, policy) in Policy::ALL {
        let alone = FleetConfig {
            num_threads: 1,
            ..fleet(policy, 20)
        };
        let first = run(alone, &workload);
        assert!(first == run(fleet(policy, 20), &workload), "{name}");
    }
}

#[test]
fn a_faster_machine_or_loader_or_another_replica_makes_it_sooner() {
    let mut quick_loads = fleet(Policy::RoundRobin, 1);
    quick_loads.replica.loading.bytes_per_s = 1e11;
    let mut quick_steps = fleet(Policy::RoundRobin, 1);
    quick_steps.replica.costs = Arc::new(CostModel {
        rows: vec![(1.0, 1e-3), (64.0, 2e-3)],
        ..CostModel::default()
    });
    let two = fleet(Policy::LeastLoaded, 2);
    for (name, better, per_s) in [
        ("loads", quick_loads, 20.0),
        ("steps", quick_steps, 300.0),
        ("two", two, 300.0),
    ] {
        let workload = workload(400, 50, per_s);
        let before_s = mean_end_to_end(&run(fleet(Policy::RoundRobin, 1), &workload), &workload);
        let after_s = mean_end_to_end(&run(better, &workload), &workload);
        assert!(
            after_s < before_s,
            "{name}: {after_s} s instead of {before_s} s"
        );
    }
}

#[test]
fn adapters_that_stay_at_home_are_loaded_less_often() {
    let workload = workload(3000, 400, 200.0);
    let loads = |policy| {
        let result = run(fleet(policy, 8), &workload);
        result.replicas.iter().map(|r| r.num_loads).sum::<u64>()
    };
    let in_turn = loads(Policy::RoundRobin);
    for policy in [Policy::Home, Policy::HomeAndSpill, Policy::Prefix] {
        assert!(loads(policy) * 3 < in_turn * 2, "{policy:?}");
    }
}

#[test]
fn shared_prefixes_are_cached() {
    let same = |at_s| Arrival {
        at_s,
        adapter: Some(3),
        prompt_tokens: 100,
        answer_tokens: 2,
        prefix: 1,
        prefix_tokens: 64,
    };
    let workload = Workload::new(
        vec![same(0.0), same(1.0)],
        Adapters::new(vec![ADAPTER_NBYTES]),
    )
    .unwrap();
    let result = run(fleet(Policy::RoundRobin, 1), &workload);
    let cached = result.outcomes.iter().map(|outcome| outcome.cached_tokens);
    assert_eq!(cached.collect::<Vec<_>>(), [0, 64]);
    let resident = result.outcomes.iter().map(|outcome| outcome.was_resident);
    assert_eq!(resident.collect::<Vec<_>>(), [false, true]);
}

#[test]
fn what_does_not_fit_or_may_not_wait_is_refused_and_counted() {
    let mut config = fleet(Policy::RoundRobin, 1);
    config.replica.max_waiting = 3;
    let arrival = |prompt_tokens| Arrival {
        at_s: 0.0,
        adapter: None,
        prompt_tokens,
        answer_tokens: 4,
        prefix: 0,
        prefix_tokens: 0,
    };
    let arrivals = [2000, 8, 8, 8, 8].map(arrival).to_vec();
    let workload = Workload::new(arrivals, Adapters::new(Vec::new())).unwrap();
    let result = run(config, &workload);
    let refused = result.outcomes.iter().map(|outcome| outcome.is_refused);
    assert_eq!(
        refused.collect::<Vec<_>>(),
        [true, false, false, false, true]
    );
    assert_eq!(result.replicas[0].peak_waiting, 3);
}

#[test]
fn a_million_adapters_pass_through_a_small_replica() {
    let arrivals = (0..20_000u32).map(|index| Arrival {
        at_s: f64::from(index) / 1000.0,
        adapter: Some(index * 50),
        prompt_tokens: 4,
        answer_tokens: 1,
        prefix: 0,
        prefix_tokens: 0,
    });
    let workload = Workload::new(arrivals.collect(), Adapters::new(vec![1 << 20])).unwrap();
    let result = run(fleet(Policy::Home, 2), &workload);
    let loads: u64 = result.replicas.iter().map(|r| r.num_loads).sum();
    assert_eq!(loads, 20_000);
}
