//! What a step computes, in which order, and what it yields.

use super::*;

#[test]
fn prompts_are_chunked_under_the_budget_and_sampled_once_complete() {
    let mut s = scheduler(|c| c.max_batched_tokens = 6);
    s.submit(request(&[1; 10], &[], 2)).unwrap();
    let first = step(&mut s).unwrap();
    assert_eq!((first.num_tokens(), first.logits_indices.len()), (6, 0));
    let second = step(&mut s).unwrap();
    assert_eq!((second.num_tokens(), second.logits_indices), (4, vec![3]));
    let third = step(&mut s).unwrap();
    assert_eq!((third.num_tokens(), third.num_prefill_tokens), (1, 0));
    assert_eq!(finishes(&mut s), [(0, FinishReason::Length)]);
    assert!(!s.has_work());
}

#[test]
fn decodes_come_before_prefills_in_budget_and_batch() {
    let mut s = scheduler(|c| c.max_batched_tokens = 6);
    s.submit(request(&[1; 3], &[], 9)).unwrap();
    step(&mut s);
    s.submit(request(&[2; 20], &[], 9)).unwrap();
    let batch = step(&mut s).unwrap();
    assert_eq!(batch.query_indptr, [0, 1, 6]);
    assert_eq!((batch.token_ids[0], batch.num_prefill_tokens), (0, 5));
}

#[test]
fn segments_follow_the_adapter_not_the_order_of_arrival() {
    let mut s = scheduler(|_| ());
    for (name, content_hash) in [("a", "h1"), ("b", "h2"), ("alias", "h1")] {
        s.register_adapter(name, AdapterContent::new(content_hash, 100))
            .unwrap();
    }
    let mixes: [&[(&str, f32)]; 6] = [
        &[("a", 1.0)],
        &[],
        &[("b", 1.0)],
        &[("alias", 1.0)],
        &[("a", 0.5), ("b", 0.5)],
        &[("b", 0.0)],
    ];
    for adapters in mixes {
        s.submit(request(&[1, 2], adapters, 4)).unwrap();
    }
    step(&mut s); // the base requests run, the adapters load
    s.drain_outputs();
    let batch = step(&mut s).unwrap();
    assert_eq!(batch.wave_indptr.len(), 3);
    // decodes of the base first; then a, alias | a·0.5 | b, where 0.5 and 1.0 don't merge
    assert_eq!(batch.query_indptr, [0, 1, 2, 4, 6, 8, 10]);
    assert_eq!(batch.seg_start.len(), 4);
    assert_eq!(
        batch.seg_end[0] - batch.seg_start[0] + batch.seg_end[1] - batch.seg_start[1],
        6
    );
}

#[test]
fn finishing_between_schedule_and_commit_drops_the_token_and_gives_the_reason() {
    let failure = Failure::new(std::io::Error::other("not finite"));
    for reason in [
        FinishReason::Abort,
        FinishReason::Stop,
        FinishReason::Error(failure),
    ] {
        let mut s = scheduler(|_| ());
        let first = s.submit(request(&[1; 5], &[], 4)).unwrap();
        s.submit(request(&[2; 5], &[], 1)).unwrap();
        let planned = s.schedule();
        assert!(s.finish(first, reason.clone()));
        assert!(!s.finish(first, FinishReason::Abort));
        commit(&mut s, &planned);
        let outputs = s.drain_outputs();
        assert_eq!(outputs.len(), 2);
        assert_eq!(
            (outputs[0].token, outputs[0].finish.clone()),
            (None, Some(reason))
        );
        assert_eq!(outputs[1].request, RequestId(1));
    }
}
