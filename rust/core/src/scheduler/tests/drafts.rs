//! Guesses: where they go in a step, which samples are taken, and that nothing is left of the others.

use super::*;

/// Goes on with 8, if it goes on as it began.
const REPEATED: [i32; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7];

fn guessing(change: impl FnOnce(&mut SchedulerConfig)) -> Scheduler {
    scheduler(|config| {
        config.max_draft_tokens = 4;
        change(config);
    })
}

/// Submits a prompt and computes it, without guesses; the first token is `first`.
fn decoding(s: &mut Scheduler, prompt: &[i32], first: i32, max_tokens: usize) -> RequestId {
    let id = s.submit(request(prompt, &[], max_tokens)).unwrap();
    s.give_draft(id, Vec::new());
    let planned = s.schedule();
    assert_eq!(s.commit(planned.id, &[first]), [true]);
    s.drain_outputs();
    id
}

fn tokens(s: &mut Scheduler) -> Vec<i32> {
    let outputs = s.drain_outputs().into_iter();
    outputs.filter_map(|output| output.token).collect()
}

#[test]
fn what_followed_the_last_tokens_is_guessed_and_taken_as_far_as_it_comes() {
    let mut s = guessing(|_| {});
    decoding(&mut s, &REPEATED, 8, 20);
    let planned = s.schedule();
    let batch = planned.batch.unwrap();
    assert_eq!(batch.token_ids, [8, 9, 1, 2, 3]);
    assert_eq!(batch.draft_token_ids, [9, 1, 2, 3, -1]);
    assert_eq!(s.commit(planned.id, &[9, 1, 2, 3, 4]), [true; 5]);
    assert_eq!(tokens(&mut s), [9, 1, 2, 3, 4]);
    let planned = s.schedule();
    let batch = planned.batch.unwrap();
    assert_eq!(batch.token_ids, [4, 5, 6, 7, 8]);
    assert_eq!(batch.positions, [21, 22, 23, 24, 25]);
    let are_taken = s.commit(planned.id, &[5, 6, 0, 8, 9]);
    assert_eq!(are_taken, [true, true, true, false, false]);
    assert_eq!(tokens(&mut s), [5, 6, 0]);
    let batch = s.schedule().batch.unwrap();
    assert_eq!((batch.token_ids, batch.positions), (vec![0], vec![24]));
    let stats = s.stats();
    assert_eq!((stats.num_draft_tokens, stats.num_accepted_tokens), (8, 6));
    s.check_invariants();
}

#[test]
fn guesses_begin_where_a_prompt_ends_and_no_sooner() {
    let mut s = guessing(|config| config.max_batched_tokens = 12);
    s.submit(request(&REPEATED, &[], 20)).unwrap();
    let planned = s.schedule();
    let batch = planned.batch.unwrap();
    assert_eq!((batch.num_tokens(), batch.draft_token_ids.len()), (12, 0));
    s.commit(planned.id, &[]);
    let planned = s.schedule();
    let batch = planned.batch.unwrap();
    assert_eq!(batch.token_ids, [4, 5, 6, 7, 8, 9, 1, 2]);
    assert_eq!(batch.draft_token_ids, [8, 9, 1, 2, -1]);
    assert_eq!(batch.num_prefill_tokens, 8);
    let are_taken = s.commit(planned.id, &[8, 9, 0, 2, 3]);
    assert_eq!(are_taken, [true, true, true, false, false]);
    let batch = s.schedule().batch.unwrap();
    assert_eq!((batch.token_ids, batch.positions), (vec![0], vec![18]));
}

#[test]
fn what_waits_can_be_given_guesses_for_its_first_token() {
    let mut s = guessing(|config| config.max_batched_tokens = 12);
    let id = s.submit(request(&REPEATED, &[], 20)).unwrap();
    assert_eq!(s.draftable(), [id]);
    assert_eq!(s.draft(id, vec![8]), [8, 9, 1, 2]);
    s.give_draft(id, vec![5, 5]);
    let planned = s.schedule();
    s.commit(planned.id, &[]);
    assert_eq!(s.draftable(), [], "it is in the middle of its prompt");
    assert_eq!(s.draft(id, vec![5]), []);
    let planned = s.schedule();
    assert_eq!(planned.batch.unwrap().draft_token_ids, [5, 5, -1]);
    s.commit(planned.id, &[5, 5, 5]);
    assert_eq!(s.draftable(), [id]);
}

#[test]
fn an_end_among_the_guesses_ends_the_answer_there() {
    let mut s = guessing(|_| {});
    let mut asked = request(&REPEATED, &[], 20);
    asked.stop_token_ids = vec![1];
    s.submit(asked).unwrap();
    let planned = s.schedule();
    assert_eq!(planned.batch.unwrap().draft_token_ids, [8, 9, 1, 2, -1]);
    let are_taken = s.commit(planned.id, &[8, 9, 1, 2, 3]);
    assert_eq!(are_taken, [true, true, true, false, false]);
    let finishes = finishes(&mut s);
    assert_eq!(finishes, [(0, FinishReason::Stop)]);
    assert!(!s.has_work());
    s.check_invariants();
}

#[test]
fn no_guess_goes_beyond_the_last_token_that_may_come() {
    let mut s = guessing(|_| {});
    decoding(&mut s, &[7, 7, 7, 7, 7, 7], 7, 3);
    let planned = s.schedule();
    assert_eq!(planned.batch.unwrap().draft_token_ids, [7, -1]);
    assert_eq!(s.commit(planned.id, &[7, 7]), [true, true]);
    assert_eq!(finishes(&mut s), [(0, FinishReason::Length)]);
}

#[test]
fn rejected_guesses_never_enter_the_prefix_cache() {
    let mut s = guessing(|config| config.block_size = 2);
    let id = decoding(&mut s, &[1, 2, 3, 4, 9, 1], 2, 20);
    s.give_draft(id, vec![3, 4, 9, 1]);
    let planned = s.schedule();
    assert_eq!(planned.batch.unwrap().token_ids, [2, 3, 4, 9, 1]);
    s.commit(planned.id, &[3, 8, 9, 1, 2]);
    s.finish(id, FinishReason::Abort);
    s.drain_outputs();
    // Computed and kept are 1 2 | 3 4 | 9 1 | 2 3, and 8 is not computed yet.
    s.submit(request(&[1, 2, 3, 4, 9, 1, 2, 3, 4, 9, 1], &[], 1))
        .unwrap();
    assert_eq!(num_cached(&mut s), [8]);
    s.submit(request(&[1, 2, 3, 4, 9, 1, 2, 3, 8, 9, 1], &[], 1))
        .unwrap();
    assert_eq!(num_cached(&mut s), [8]);
}

#[test]
fn guesses_leave_the_step_to_whatever_else_there_is() {
    let mut s = guessing(|config| {
        config.max_drafted_step = 6;
        config.max_batched_tokens = 7;
    });
    let first = decoding(&mut s, &[7; 6], 7, 20);
    let second = decoding_beside(&mut s, &[8; 6], 8, 20);
    let batch = s.schedule();
    let drafted = batch.batch.unwrap();
    assert_eq!(drafted.request_ids, [first.0, second.0]);
    assert_eq!(drafted.token_ids, [7, 7, 7, 8, 8, 8]);
    s.commit(batch.id, &[7, 7, 7, 8, 8, 8]);
    s.submit(request(&[5, 6, 5, 6, 5], &[], 2)).unwrap();
    let beside_prompt = s.schedule().batch.unwrap();
    assert_eq!(beside_prompt.num_tokens(), 7);
    assert!(beside_prompt.draft_token_ids.is_empty());
}

/// As `decoding`, beside a sequence whose samples go on as they are guessed.
fn decoding_beside(s: &mut Scheduler, prompt: &[i32], first: i32, max_tokens: usize) -> RequestId {
    let id = s.submit(request(prompt, &[], max_tokens)).unwrap();
    s.give_draft(id, Vec::new());
    let planned = s.schedule();
    let batch = planned.batch.unwrap();
    let sampled = batch
        .sample_request_ids
        .iter()
        .map(|&r| if r == id.0 { first } else { 7 });
    let sampled: Vec<_> = sampled.collect();
    s.commit(planned.id, &sampled);
    s.drain_outputs();
    id
}

#[test]
fn guesses_take_no_page_that_somebody_might_need() {
    let mut s = guessing(|config| {
        (config.num_pages, config.block_size) = (4, 4);
        config.prefix_caching = false;
    });
    // Three pages hold the prompts; one is left, which either may need.
    let first = decoding(&mut s, &[7, 7, 7, 7, 7, 7], 7, 8);
    s.give_draft(first, Vec::new());
    let second = decoding_beside(&mut s, &[8, 8], 8, 8);
    s.give_draft(first, vec![7, 7, 7]);
    s.give_draft(second, vec![8, 8, 8]);
    let planned = s.schedule();
    let batch = planned.batch.unwrap();
    assert_eq!(batch.request_ids, [first.0, second.0]);
    assert_eq!(batch.positions, [7, 2, 3]);
    assert_eq!(s.stats().num_free_pages, 1);
}

#[test]
fn who_wants_no_guesses_is_given_none() {
    let mut s = guessing(|_| {});
    let mut asked = request(&[7, 7, 7, 7], &[], 20);
    asked.without_guesses = true;
    let id = s.submit(asked).unwrap();
    let planned = s.schedule();
    s.commit(planned.id, &[7]);
    s.give_draft(id, vec![7]);
    assert_eq!(s.draft(id, vec![7]), []);
    assert_eq!(s.schedule().batch.unwrap().token_ids, [7]);
}

#[test]
fn a_step_that_checks_guesses_is_committed_before_the_next_is_planned() {
    let mut s = guessing(|_| {});
    decoding(&mut s, &[7; 8], 7, 20);
    let planned = s.schedule();
    assert!(s.schedule_ahead().is_none());
    assert_eq!(s.commit(planned.id, &[7; 5]), [true; 5]);
}

#[test]
fn what_could_not_be_sampled_behind_a_guess_is_computed_again() {
    let mut s = guessing(|_| {});
    decoding(&mut s, &[7; 8], 7, 20);
    let planned = s.schedule();
    let are_taken = s.commit(planned.id, &[7, 7, -1, 7, 7]);
    assert_eq!(are_taken, [true, true, false, false, false]);
    let batch = s.schedule().batch.unwrap();
    assert_eq!((batch.positions[0], batch.token_ids[0]), (10, 7));
}
