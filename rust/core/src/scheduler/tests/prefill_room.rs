//! How many tokens of prompts a step computes beside decodes, and of which flows.

use super::*;

fn in_pieces(change: impl FnOnce(&mut SchedulerConfig)) -> Scheduler {
    scheduler(|c| {
        (c.num_pages, c.prefix_caching) = (100, false);
        (c.max_prefill_tokens, c.min_prefill_tokens) = (16, 4);
        change(c);
    })
}

fn submit(s: &mut Scheduler, flow: &str, prompt_len: usize, max_tokens: usize) {
    let new = NewRequest {
        flow: Flow {
            name: flow.into(),
            weight: FlowWeight::default(),
        },
        ..request(&vec![1; prompt_len], &[], max_tokens)
    };
    s.submit(new).unwrap();
}

/// Tokens of the next steps.
fn num_tokens(s: &mut Scheduler, num_steps: usize) -> Vec<usize> {
    let steps = (0..num_steps).map(|_| step(s).expect("there is something to do").num_tokens());
    steps.collect()
}

#[test]
fn prompts_alone_have_pieces_of_the_most_a_step_computes() {
    let mut s = in_pieces(|_| {});
    submit(&mut s, "a", 40, 2);
    assert_eq!(num_tokens(&mut s, 4), [16, 16, 8, 1]);
}

#[test]
fn beside_decodes_of_its_flow_a_prompt_has_small_pieces() {
    let mut s = in_pieces(|_| {});
    submit(&mut s, "a", 2, 9);
    step(&mut s);
    submit(&mut s, "a", 10, 2);
    assert_eq!(num_tokens(&mut s, 4), [1 + 4, 1 + 4, 1 + 2, 2]);
}

#[test]
fn pieces_are_twice_as_large_as_what_decodes() {
    let mut s = in_pieces(|_| {});
    for _ in 0..4 {
        submit(&mut s, "a", 1, 9);
    }
    step(&mut s);
    submit(&mut s, "a", 20, 2);
    assert_eq!(num_tokens(&mut s, 4), [4 + 8, 4 + 8, 4 + 4, 5]);
}

#[test]
fn a_flow_of_which_nothing_decodes_has_large_pieces_beside_others_and_leaves_them_none() {
    let mut s = in_pieces(|_| {});
    submit(&mut s, "heavy", 2, 9);
    step(&mut s);
    submit(&mut s, "heavy", 30, 2);
    step(&mut s);
    submit(&mut s, "light", 12, 2);
    let batch = step(&mut s).unwrap();
    assert_eq!(batch.num_tokens(), 1 + 12, "the piece of the flood waits");
    assert_eq!(num_tokens(&mut s, 1), [2 + 4]);
}
