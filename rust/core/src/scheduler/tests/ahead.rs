//! Steps planned before the one in flight is committed.

use super::*;

#[test]
fn the_step_behind_takes_the_samples_of_the_one_in_flight() {
    let mut s = scheduler(|config| config.max_batched_tokens = 16);
    s.submit(request(&[1, 2, 3], &[], 8)).unwrap();
    s.submit(request(&[4; 20], &[], 8)).unwrap(); // 13 tokens, then 7
    let first = s.schedule();
    let second = s.schedule_ahead().unwrap();
    let batch = second.batch.as_ref().unwrap();
    assert_eq!(batch.token_ids[0], -1);
    assert_eq!(batch.positions[0], 3);
    assert_eq!(
        batch.token_ids[1..],
        [4; 7],
        "what is known of a prompt goes on"
    );
    assert_eq!(s.commit(first.id, &[7]), [true]);
    assert_eq!(s.commit(second.id, &[8, 9]), [true, true]);
    let tokens: Vec<_> = s.drain_outputs().iter().map(|o| o.token).collect();
    assert_eq!(tokens, [Some(7), Some(8), Some(9)]);
}

#[test]
fn a_row_behind_an_end_is_discarded_and_one_behind_the_last_token_is_not_planned() {
    let mut s = scheduler(|_| ());
    let stops = NewRequest {
        stop_token_ids: vec![7],
        ..request(&[1, 2], &[], 8)
    };
    s.submit(stops).unwrap();
    s.submit(request(&[3, 4], &[], 1)).unwrap();
    let first = s.schedule();
    let second = s.schedule_ahead().unwrap();
    assert_eq!(second.batch.as_ref().unwrap().sample_request_ids, [0]);
    assert_eq!(s.commit(first.id, &[7, 5]), [true, true]);
    assert_eq!(
        finishes(&mut s),
        [(0, FinishReason::Stop), (1, FinishReason::Length)]
    );
    assert_eq!(s.commit(second.id, &[9]), [false]);
    assert!(s.drain_outputs().is_empty());
    s.check_invariants();
    assert_eq!(s.stats().num_kv_pages, 0);
}

#[test]
fn without_a_page_for_everyone_the_step_in_flight_is_committed_first() {
    let mut s = scheduler(|config| {
        (config.num_pages, config.prefix_caching) = (4, false);
        config.max_model_len = 12;
    });
    for token in [1, 2] {
        s.submit(request(&[token; 4], &[], 6)).unwrap();
    }
    step(&mut s);
    let planned = s.schedule(); // the last two pages
    commit(&mut s, &planned);
    for _ in 0..2 {
        step(&mut s);
    }
    let planned = s.schedule();
    assert!(s.schedule_ahead().is_none());
    commit(&mut s, &planned);
    drain(&mut s);
    assert!(s.stats().num_preemptions > 0);
}
