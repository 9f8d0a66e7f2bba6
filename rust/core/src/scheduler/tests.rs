use super::*;
use crate::ids::CacheScope;
use crate::request::{FinishReason, NewRequest};

fn scheduler(change: impl FnOnce(&mut SchedulerConfig)) -> Scheduler {
    let mut config = SchedulerConfig {
        num_pages: 16,
        page_nbytes: 100,
        block_size: 4,
        max_num_seqs: 8,
        max_batched_tokens: 64,
        max_model_len: 64,
        ..SchedulerConfig::default()
    };
    change(&mut config);
    Scheduler::new(config).unwrap()
}

fn request(prompt: &[i32], adapters: &[(&str, f32)], max_tokens: usize) -> NewRequest {
    NewRequest {
        prompt: prompt.to_vec(),
        adapters: adapters
            .iter()
            .map(|&(name, weight)| (name.to_owned(), weight))
            .collect(),
        max_tokens: Some(max_tokens),
        ..NewRequest::default()
    }
}

/// Commits 0 for every row sampled.
fn commit(scheduler: &mut Scheduler, step: &Step) {
    let num_samples = step
        .batch
        .as_ref()
        .map_or(0, |batch| batch.logits_indices.len());
    scheduler.commit(step.id, &vec![0; num_samples]);
    scheduler.check_invariants();
}

/// Steps once, answering loads at once; returns the batch.
fn step(scheduler: &mut Scheduler) -> Option<Batch> {
    let step = scheduler.schedule();
    scheduler.check_invariants();
    commit(scheduler, &step);
    for load in &step.loads {
        scheduler.adapter_loaded(load.adapter).unwrap();
    }
    step.batch
}

fn drain(scheduler: &mut Scheduler) {
    for _ in 0..1000 {
        if !scheduler.has_work() {
            return;
        }
        step(scheduler);
    }
    panic!("the queue drains: {:?}", scheduler.stats());
}

/// Tokens of all answers until the queue is empty.
fn num_generated(scheduler: &mut Scheduler) -> usize {
    drain(scheduler);
    let outputs = scheduler.drain_outputs().into_iter();
    outputs.filter(|output| output.token.is_some()).count()
}

fn finishes(scheduler: &mut Scheduler) -> Vec<(u64, FinishReason)> {
    let outputs = scheduler.drain_outputs().into_iter();
    outputs
        .filter_map(|output| Some((output.request.0, output.finish?)))
        .collect()
}

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
fn second_request_reuses_the_prefix_but_recomputes_its_last_token() {
    let mut s = scheduler(|_| ());
    for _ in 0..2 {
        s.submit(request(&[1; 8], &[], 1)).unwrap();
        drain(&mut s);
    }
    let cached: Vec<_> = s
        .drain_outputs()
        .iter()
        .map(|output| output.num_cached_tokens)
        .collect();
    assert_eq!(cached, [0, 4]);
}

#[test]
fn weights_that_leave_only_the_base_model_are_refused_to_who_may_not_use_it() {
    let mut s = scheduler(|_| ());
    for (name, content) in [
        ("a", "one"),
        ("also-a", "one"),
        ("again-a", "one"),
        ("b", "two"),
    ] {
        s.register_adapter(name, content, 100).unwrap();
    }
    let cases: [(&[(&str, f32)], bool); 11] = [
        (&[], true),
        (&[("a", 0.0)], true),
        (&[("a", -0.0), ("b", 0.0)], true),
        (&[("a", 1.0), ("also-a", -1.0)], true),
        (&[("a", 0.1), ("also-a", 0.2), ("again-a", -0.3)], true),
        (
            &[("a", 1000.1), ("also-a", -1000.0), ("again-a", -0.1)],
            true,
        ),
        (&[("a", 1.0)], false),
        (&[("a", 1.0), ("b", -1.0)], false),
        (&[("a", 1.0), ("also-a", -1.0), ("b", 0.5)], false),
        (&[("a", 1.0), ("also-a", -0.999)], false),
        (&[("a", 0.001)], false),
    ];
    for (adapters, only_base_left) in cases {
        let submit = |s: &mut Scheduler, needs_adapter| {
            let submitted = s.submit(NewRequest {
                needs_adapter,
                ..request(&[1; 9], adapters, 1)
            });
            submitted.map(|_| drain(s))
        };
        let refused = Err(Error::OnlyBaseModelLeft);
        let expected = if only_base_left { refused } else { Ok(()) };
        assert_eq!(submit(&mut s, true), expected, "{adapters:?}");
        assert_eq!(submit(&mut s, false), Ok(()));
    }
}

#[test]
fn a_prompt_cached_in_one_scope_is_computed_again_in_another() {
    let scope = |tenant: &str, salt: &str| CacheScope {
        tenant: tenant.into(),
        salt: salt.into(),
    };
    let mut s = scheduler(|_| ());
    for name in ["a", "also-a"] {
        s.register_adapter(name, "same content", 100).unwrap();
    }
    let mut cached = Vec::new();
    for (adapter, scope) in [
        ("a", scope("one", "")),
        ("also-a", scope("two", "")),
        ("a", scope("", "one")),
        ("a", scope("one", "salt")),
        ("also-a", scope("one", "")),
        ("a", scope("two", "")),
    ] {
        s.submit(NewRequest {
            scope,
            ..request(&[1; 9], &[(adapter, 1.0)], 1)
        })
        .unwrap();
        drain(&mut s);
        cached.push(s.drain_outputs()[0].num_cached_tokens);
    }
    assert_eq!(cached, [0, 0, 0, 0, 8, 8]);
}

#[test]
fn name_bound_to_other_content_never_meets_the_old_prefix() {
    let mut s = scheduler(|_| ());
    let mut cached = Vec::new();
    for content_hash in ["h1", "h2", "h1"] {
        s.register_adapter("a", content_hash, 100).unwrap();
        s.submit(request(&[1; 9], &[("a", 1.0)], 1)).unwrap();
        drain(&mut s);
        cached.push(s.drain_outputs()[0].num_cached_tokens);
        s.unregister_adapter("a").unwrap();
    }
    assert_eq!(cached, [0, 0, 8]);
}

#[test]
fn evicted_adapter_is_reloaded_on_next_request() {
    let mut s = scheduler(|c| c.prefix_caching = false);
    s.register_adapter("a", "h1", 1000).unwrap();
    s.register_adapter("b", "h2", 1000).unwrap();
    for name in ["a", "b", "a"] {
        s.submit(request(&[1, 2], &[(name, 1.0)], 1)).unwrap();
        drain(&mut s);
    }
    assert_eq!((s.stats().num_loads, s.stats().num_evictions), (3, 2));
    assert_eq!(s.adapters()[1].state, "registered");
}

#[test]
fn failed_load_fails_only_the_requests_that_named_it_and_is_tried_again() {
    let mut s = scheduler(|_| ());
    let bad = s.register_adapter("bad", "h1", 100).unwrap();
    s.submit(request(&[1], &[("bad", 1.0)], 3)).unwrap();
    s.submit(request(&[1], &[], 3)).unwrap();
    let first = s.schedule();
    assert_eq!(first.loads.len(), 1);
    commit(&mut s, &first);
    let failure = Failure {
        class: "AdapterUnavailableError".into(),
        message: "gone".into(),
    };
    s.adapter_load_failed(bad, &failure).unwrap();
    s.check_invariants();
    assert_eq!(finishes(&mut s), [(0, FinishReason::Error(failure))]);
    assert_eq!(s.adapters()[0].state, "failed");
    s.submit(request(&[1], &[("bad", 1.0)], 3)).unwrap();
    drain(&mut s);
    assert_eq!(finishes(&mut s).len(), 2);
}

#[test]
fn request_that_could_never_fit_is_refused_with_what_it_needs() {
    let mut s = scheduler(|_| ());
    s.register_adapter("a", "h1", 950).unwrap();
    let message = s
        .submit(request(&[1; 10], &[("a", 1.0)], 20))
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        "request needs 1800 bytes (8 pages of KV cache, 10 pages of adapters), the pool has 1600 bytes (16 pages); lower max_tokens or raise the memory budget"
    );
    let too_large = s.register_adapter("b", "h2", 1600).unwrap_err();
    assert_eq!(too_large.kind(), crate::ErrorKind::Capacity);
    assert!(s.submit(request(&[1; 10], &[("a", 1.0)], 14)).is_ok());
}

#[test]
fn request_without_a_limit_gets_what_fits_beside_its_and_the_pinned_adapters() {
    let unlimited = |prompt: &[i32], adapters: &[(&str, f32)]| NewRequest {
        max_tokens: None,
        ..request(prompt, adapters, 1)
    };
    // 16 pages of 4 tokens; the context is longer than the pool
    let mut s = scheduler(|config| config.max_model_len = 100);
    s.register_adapter("own", "h1", 300).unwrap();
    s.register_adapter("pinned", "h2", 500).unwrap();
    for (adapters, expected) in [(&[][..], 64 - 5), (&[("own", 1.0)][..], 64 - 5 - 3 * 4)] {
        s.submit(unlimited(&[1; 5], adapters)).unwrap();
        assert_eq!(num_generated(&mut s), expected);
    }
    s.pin_adapter("pinned", true).unwrap();
    drain(&mut s);
    for (name, expected) in [("own", 64 - 5 - 8 * 4), ("pinned", 64 - 5 - 5 * 4)] {
        s.submit(unlimited(&[1; 5], &[(name, 1.0)])).unwrap();
        assert_eq!(num_generated(&mut s), expected);
    }
    let too_long = s.submit(unlimited(&[1; 32], &[("own", 1.0)]));
    assert!(too_long.is_err_and(|error| error.to_string().starts_with("request needs 9 pages")));
    // a context shorter than the pool
    let mut s = scheduler(|config| config.max_model_len = 32);
    s.submit(unlimited(&[1; 5], &[])).unwrap();
    assert_eq!(num_generated(&mut s), 32 - 5);
}

#[test]
fn newest_is_preempted_when_memory_is_short_and_both_finish() {
    let mut s = scheduler(|c| c.num_pages = 6);
    s.submit(request(&[1; 8], &[], 12)).unwrap();
    s.submit(request(&[2; 4], &[], 12)).unwrap();
    drain(&mut s);
    assert!(s.stats().num_preemptions > 0);
    assert_eq!(
        finishes(&mut s),
        [(0, FinishReason::Length), (1, FinishReason::Length)]
    );
}

#[test]
fn waiting_for_a_load_lets_others_pass_a_bounded_number_of_times() {
    let mut s = scheduler(|c| c.max_overtakes = 3);
    let slow = s.register_adapter("slow", "h1", 100).unwrap();
    s.submit(request(&[1], &[("slow", 1.0)], 1)).unwrap();
    for _ in 0..6 {
        s.submit(request(&[1], &[], 1)).unwrap();
    }
    for _ in 0..4 {
        let planned = s.schedule();
        commit(&mut s, &planned);
    }
    assert_eq!(finishes(&mut s).len(), 3);
    s.adapter_loaded(slow).unwrap();
    step(&mut s);
    assert!(finishes(&mut s).contains(&(0, FinishReason::Length)));
}

#[test]
fn running_sequences_are_preempted_before_the_next_request_loses_its_adapter() {
    let mut s = scheduler(|c| (c.num_pages, c.prefix_caching) = (8, false));
    s.register_adapter("a", "h1", 300).unwrap();
    for _ in 0..2 {
        s.submit(request(&[1; 3], &[], 16)).unwrap();
    }
    step(&mut s);
    s.submit(request(&[2; 16], &[("a", 1.0)], 4)).unwrap();
    while s.stats().num_preemptions == 0 {
        assert!(step(&mut s).is_some());
    }
    assert_eq!((s.stats().num_loads, s.stats().num_evictions), (1, 0));
    drain(&mut s);
}

#[test]
fn admission_leaves_each_running_sequence_a_block_to_grow() {
    let mut s = scheduler(|c| c.num_pages = 6);
    s.submit(request(&[1; 3], &[], 3)).unwrap();
    step(&mut s);
    s.submit(request(&[2; 20], &[], 2)).unwrap();
    step(&mut s);
    assert_eq!(s.stats().num_running, 1);
    drain(&mut s);
    assert_eq!(s.stats().num_preemptions, 0);
}

#[test]
fn idle_extents_move_to_make_room_and_running_ones_stay() {
    let mut s = scheduler(|c| c.prefix_caching = false);
    for (index, name) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
        s.register_adapter(name, &format!("h{index}"), 300).unwrap();
    }
    s.register_adapter("big", "big", 600).unwrap();
    for name in ["a", "b", "c", "d", "e"] {
        s.submit(request(&[1], &[(name, 1.0)], 1)).unwrap();
        drain(&mut s);
    }
    s.submit(request(&[1], &[("e", 1.0)], 12)).unwrap();
    step(&mut s);
    s.unregister_adapter("a").unwrap();
    s.unregister_adapter("c").unwrap();
    s.submit(request(&[1], &[("big", 1.0)], 1)).unwrap();
    let planned = s.schedule();
    s.check_invariants();
    assert_eq!((planned.moves.len(), planned.loads.len()), (2, 1));
    assert_eq!(s.stats().num_evictions, 0);
}

#[test]
fn aborting_between_schedule_and_commit_drops_the_token() {
    let mut s = scheduler(|_| ());
    let first = s.submit(request(&[1; 5], &[], 4)).unwrap();
    s.submit(request(&[2; 5], &[], 1)).unwrap();
    let planned = s.schedule();
    assert!(s.abort(first));
    assert!(!s.abort(first));
    commit(&mut s, &planned);
    let outputs = s.drain_outputs();
    assert_eq!(outputs.len(), 2);
    assert_eq!(
        (outputs[0].token, outputs[0].finish.clone()),
        (None, Some(FinishReason::Abort))
    );
    assert_eq!(outputs[1].request, RequestId(1));
}

#[test]
fn segments_follow_the_adapter_not_the_order_of_arrival() {
    let mut s = scheduler(|_| ());
    for (name, content_hash) in [("a", "h1"), ("b", "h2"), ("alias", "h1")] {
        s.register_adapter(name, content_hash, 100).unwrap();
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
fn adapters_beyond_the_slots_take_turns() {
    let mut s = scheduler(|c| c.max_num_slots = 2);
    for name in ["a", "b", "c"] {
        s.register_adapter(name, name, 100).unwrap();
        s.submit(request(&[1, 2, 3], &[(name, 1.0)], 3)).unwrap();
    }
    drain(&mut s);
    let stats = s.stats();
    assert_eq!((stats.num_resident_adapters, stats.num_evictions), (2, 1));
    let three = [("a", 1.0), ("b", 1.0), ("c", 1.0)];
    let refused = s.submit(request(&[1], &three, 1)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "request names 3 adapters, at most 2 can be resident at once"
    );
}

fn state_of(scheduler: &Scheduler, name: &str) -> &'static str {
    let listed = scheduler.adapters();
    listed.iter().find(|info| info.name == name).unwrap().state
}

#[test]
fn warm_adapter_is_resident_before_its_first_request() {
    let mut s = scheduler(|_| ());
    s.register_adapter("a", "h1", 300).unwrap();
    assert_eq!(s.warm_adapter("a"), Ok(false));
    assert_eq!(s.warm_adapter("a"), Ok(false));
    step(&mut s);
    assert_eq!((state_of(&s, "a"), s.num_wanted()), ("resident", 0));
    assert_eq!(s.warm_adapter("a"), Ok(true));
    let id = s.submit(request(&[1], &[("a", 1.0)], 1)).unwrap();
    assert!(s.has_its_adapters(id));
    let planned = s.schedule();
    assert_eq!((planned.loads.len(), planned.admitted), (0, vec![id]));
}

#[test]
fn warm_adapter_takes_no_memory_that_a_request_waits_for() {
    let mut s = scheduler(|c| (c.num_pages, c.prefix_caching) = (8, false));
    s.register_adapter("a", "h1", 400).unwrap();
    s.submit(request(&[1; 19], &[], 1)).unwrap();
    s.submit(request(&[2; 16], &[], 1)).unwrap();
    s.warm_adapter("a").unwrap();
    let first = s.schedule();
    assert!(first.loads.is_empty());
    commit(&mut s, &first);
    let second = s.schedule();
    assert!(second.loads.is_empty());
    commit(&mut s, &second);
    step(&mut s);
    assert_eq!(state_of(&s, "a"), "resident");
}

#[test]
fn pinned_adapter_is_loaded_and_stays_while_others_are_evicted() {
    let mut s = scheduler(|c| c.prefix_caching = false);
    for name in ["a", "b", "c", "d"] {
        s.register_adapter(name, name, 500).unwrap();
    }
    s.pin_adapter("a", true).unwrap();
    step(&mut s);
    for _ in 0..3 {
        for name in ["b", "c", "d"] {
            s.submit(request(&[1], &[(name, 1.0)], 1)).unwrap();
            drain(&mut s);
            assert_eq!(state_of(&s, "a"), "resident");
        }
    }
    assert!(s.stats().num_evictions >= 6);
    assert_eq!(s.stats().pinned_pages, 5);
    s.pin_adapter("a", false).unwrap();
    for name in ["b", "c", "d"] {
        s.submit(request(&[1], &[(name, 1.0)], 1)).unwrap();
        drain(&mut s);
    }
    assert_eq!(state_of(&s, "a"), "registered");
    let listed = s.adapters();
    assert_eq!((listed[0].num_loads, listed[0].num_evictions), (1, 1));
}

#[test]
fn pins_leave_room_for_what_was_accepted_and_requests_are_refused_beside_them() {
    let mut s = scheduler(|_| ());
    for (name, nbytes) in [("a", 600), ("b", 300), ("big", 1200)] {
        s.register_adapter(name, name, nbytes).unwrap();
    }
    let message = |error: Error| error.to_string();
    assert!(message(s.pin_adapter("big", true).unwrap_err()).contains("may take 8 and take 0"));
    let large = s.submit(request(&[1; 40], &[], 10)).unwrap();
    let refused = message(s.pin_adapter("a", true).unwrap_err());
    assert!(
        refused.contains("request 0 needs the memory: 13 pages"),
        "{refused}"
    );
    s.abort(large);
    s.pin_adapter("a", true).unwrap();
    let refused = message(s.pin_adapter("b", true).unwrap_err());
    assert!(refused.contains("needs 3 pages of memory, pinned adapters may take 8 and take 6"));
    let refused = message(s.submit(request(&[1; 40], &[], 10)).unwrap_err());
    assert!(refused.contains("13 pages of KV cache and 0 pages of adapters, 10 are left"));
    let refused = message(s.warm_adapter("big").unwrap_err());
    assert!(refused.contains("needs 12 pages of memory, pinned adapters leave 10"));
    s.submit(request(&[1; 32], &[("a", 1.0)], 8)).unwrap();
    drain(&mut s);
    s.unregister_adapter("a").unwrap();
    assert_eq!(s.stats().pinned_pages, 0);
    s.submit(request(&[1; 40], &[], 10)).unwrap();
    drain(&mut s);
}

#[test]
fn adapter_with_two_names_stays_until_both_let_it_go() {
    let mut s = scheduler(|_| ());
    for name in ["a", "alias"] {
        s.register_adapter(name, "h1", 300).unwrap();
        s.pin_adapter(name, true).unwrap();
        s.pin_adapter(name, true).unwrap();
    }
    assert_eq!(s.stats().pinned_pages, 3);
    s.unregister_adapter("alias").unwrap();
    assert_eq!(s.stats().pinned_pages, 3);
    s.pin_adapter("a", false).unwrap();
    assert_eq!(s.stats().pinned_pages, 0);
}
