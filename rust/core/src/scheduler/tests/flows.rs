//! Flows take turns by what they were served, and each has its part however others behave.

use super::*;

const BLOCK_SIZE: usize = 4;

/// xorshift64*
struct Rng(u64);

impl Rng {
    fn range(&mut self, low: usize, high: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let drawn = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11;
        low + (drawn % (high - low + 1) as u64) as usize
    }
}

fn submit(s: &mut Scheduler, flow: (&str, f64), prompt_len: usize, max_tokens: usize) -> u64 {
    let new = NewRequest {
        flow: Flow {
            name: flow.0.into(),
            weight: FlowWeight::new(flow.1).unwrap(),
        },
        ..request(&vec![1; prompt_len], &[], max_tokens)
    };
    s.submit(new).unwrap().0
}

fn stats_of(s: &Scheduler, name: &str) -> FlowStats {
    let mut flows = s.flows().0.into_iter();
    flows.find(|flow| &*flow.name == name).expect("it is known")
}

fn served(s: &Scheduler, name: &str) -> u64 {
    stats_of(s, name).served.cost()
}

/// Keeps `num_waiting` requests of a flow in the queue.
fn backlog(
    s: &mut Scheduler,
    flow: (&str, f64),
    num_waiting: usize,
    mut size: impl FnMut() -> (usize, usize),
) {
    let known = s.flows().0;
    let of_flow = known.iter().find(|known| &*known.name == flow.0);
    for _ in of_flow.map_or(0, |known| known.num_waiting)..num_waiting {
        let (prompt_len, max_tokens) = size();
        submit(s, flow, prompt_len, max_tokens);
    }
}

#[test]
fn a_request_of_a_flow_served_less_goes_before_a_flood() {
    let mut s = scheduler(|c| c.max_num_seqs = 2);
    for _ in 0..10 {
        submit(&mut s, ("heavy", 1.0), 4, 3);
    }
    step(&mut s);
    step(&mut s);
    let light = submit(&mut s, ("light", 1.0), 4, 3);
    step(&mut s);
    let batch = step(&mut s).unwrap();
    assert!(
        batch.request_ids.contains(&light),
        "{:?}",
        batch.request_ids
    );
}

#[test]
fn a_short_prompt_goes_before_the_rest_of_another_flows_long_ones() {
    let mut s = scheduler(|c| {
        (c.max_batched_tokens, c.num_pages) = (16, 80);
        c.prefix_caching = false;
    });
    for _ in 0..4 {
        submit(&mut s, ("heavy", 1.0), 60, 2);
    }
    step(&mut s);
    let light = submit(&mut s, ("light", 1.0), 6, 2);
    let batch = step(&mut s).unwrap();
    assert!(batch.sample_request_ids.contains(&light));
    assert_eq!(
        batch.num_tokens(),
        16,
        "the rest of the step is the others'"
    );
}

#[test]
fn two_flows_that_always_wait_are_served_alike_within_the_bound_of_vtc() {
    for seed in 1..40 {
        let (num_pages, longest) = (24, 60);
        let mut s = scheduler(|c| {
            (c.num_pages, c.max_num_seqs) = (num_pages, 2 + seed as usize % 7);
            c.max_batched_tokens = [8, 32, 200][seed as usize % 3];
            c.max_prefill_tokens = [usize::MAX, 16, 5][seed as usize % 3];
            c.min_prefill_tokens = [usize::MAX, 3][seed as usize % 2];
            c.prefix_caching = false;
        });
        let mut rng = Rng(seed);
        // As in the paper: 2 · max(w_p · L_input, w_q · M), M the tokens that run at once.
        let bound = 2 * longest.max(2 * num_pages * BLOCK_SIZE) as u64;
        let mut most = 0;
        for number in 0..1500 {
            backlog(&mut s, ("short", 1.0), 12, || {
                (rng.range(1, 4), rng.range(1, 20))
            });
            backlog(&mut s, ("long", 1.0), 12, || {
                (rng.range(40, longest), rng.range(1, 3))
            });
            if rng.range(0, 9) == 0 {
                let name = format!("other {}", number % 7);
                submit(&mut s, (&name, 1.0), rng.range(1, 20), rng.range(1, 9));
            }
            step(&mut s);
            s.drain_outputs();
            most = most.max(served(&s, "short").abs_diff(served(&s, "long")));
            assert!(
                most <= bound,
                "seed {seed}, step {number}: {most} of {bound}"
            );
        }
        let total = served(&s, "short") + served(&s, "long");
        assert!(
            total > 10 * bound,
            "it is no bound if little is served: {total}"
        );
    }
}

#[test]
fn who_has_three_times_the_weight_is_served_three_times_as_much() {
    let mut s = scheduler(|c| c.max_num_seqs = 4);
    for _ in 0..3000 {
        backlog(&mut s, ("one", 1.0), 6, || (8, 4));
        backlog(&mut s, ("three", 3.0), 6, || (8, 4));
        step(&mut s);
        s.drain_outputs();
    }
    let ratio = served(&s, "three") as f64 / served(&s, "one") as f64;
    assert!((2.8..=3.2).contains(&ratio), "{ratio}");
}

#[test]
fn flows_without_end_that_were_never_served_do_not_starve_who_was() {
    let mut s = scheduler(|c| c.max_num_seqs = 1);
    for number in 0..8 {
        submit(&mut s, (&format!("n{number}"), 1.0), 4, 1);
    }
    submit(&mut s, ("heavy", 0.01), 16, 1);
    submit(&mut s, ("heavy", 0.01), 16, 1);
    for number in 8..20_000 {
        submit(&mut s, (&format!("n{number}"), 1.0), 4, 1);
        step(&mut s);
        s.drain_outputs();
        if stats_of(&s, "heavy").num_waiting == 0 {
            return;
        }
    }
    panic!(
        "both of its requests run in the end: {:?}",
        stats_of(&s, "heavy")
    );
}

#[test]
fn what_is_computed_again_after_a_preemption_is_free() {
    let mut s = scheduler(|c| (c.num_pages, c.prefix_caching) = (6, false));
    submit(&mut s, ("a", 1.0), 8, 12);
    submit(&mut s, ("b", 1.0), 8, 12);
    drain(&mut s);
    assert!(s.stats().num_preemptions > 0);
    assert_eq!((served(&s, "a"), served(&s, "b")), (32, 32));
}

#[test]
fn cached_tokens_of_a_prompt_are_free() {
    let mut s = scheduler(|_| ());
    submit(&mut s, ("a", 1.0), 13, 1);
    drain(&mut s);
    submit(&mut s, ("b", 1.0), 13, 1);
    drain(&mut s);
    assert_eq!((served(&s, "a"), served(&s, "b")), (15, 3));
}

#[test]
fn who_waits_for_a_late_load_saves_nothing_up() {
    let mut s = scheduler(|_| ());
    let late = s
        .register_adapter("late", AdapterContent::new("late", 100))
        .unwrap();
    let stuck = NewRequest {
        flow: Flow {
            name: "stuck".into(),
            ..Flow::default()
        },
        ..request(&[1], &[("late", 1.0)], 1)
    };
    s.submit(stuck).unwrap();
    let planned = s.schedule();
    commit(&mut s, &planned);
    s.adapter_load_late(late).unwrap();
    for _ in 0..50 {
        backlog(&mut s, ("busy", 1.0), 12, || (8, 2));
        let planned = s.schedule();
        commit(&mut s, &planned);
    }
    let busy = stats_of(&s, "busy");
    assert!(busy.served.cost() > 500 && busy.lead <= 200.0, "{busy:?}");
}

#[test]
fn where_all_places_are_taken_a_flow_without_any_is_given_one() {
    let mut s = scheduler(|c| c.max_num_seqs = 3);
    let heavy: Vec<_> = (0..6)
        .map(|_| submit(&mut s, ("heavy", 1.0), 4, 30))
        .collect();
    step(&mut s);
    step(&mut s);
    let light = submit(&mut s, ("light", 1.0), 4, 2);
    let batch = step(&mut s).unwrap();
    assert!(batch.request_ids.contains(&light));
    assert!(
        !batch.request_ids.contains(&heavy[2]),
        "the newest gave way"
    );
    submit(&mut s, ("third", 1.0), 4, 2);
    let num_preemptions = s.stats().num_preemptions;
    step(&mut s);
    assert_eq!(
        s.stats().num_preemptions,
        num_preemptions,
        "not again so soon"
    );
    drain(&mut s);
    assert_eq!(finishes(&mut s).len(), 8);
}

#[test]
fn flows_within_their_parts_of_the_places_are_not_set_back() {
    let mut s = scheduler(|c| c.max_num_seqs = 2);
    for name in ["a", "b", "c"] {
        submit(&mut s, (name, 1.0), 4, 10);
        step(&mut s);
    }
    drain(&mut s);
    assert_eq!(s.stats().num_preemptions, 0);
}

#[test]
fn each_request_is_set_back_once_at_most() {
    let mut s = scheduler(|c| c.max_num_seqs = 2);
    submit(&mut s, ("heavy", 1.0), 4, 50);
    submit(&mut s, ("heavy", 1.0), 4, 50);
    for number in 0..40 {
        submit(&mut s, (&format!("n{number}"), 1.0), 4, 1);
        step(&mut s);
    }
    assert!((1..=2).contains(&s.stats().num_preemptions));
}
