//! Adapters of requests, loads and residency: weights, failures, warming, pins.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

#[test]
fn weights_that_leave_only_the_base_model_are_refused_to_who_may_not_use_it() {
    let mut s = scheduler(|_| ());
    for (name, content) in [
        ("a", "one"),
        ("also-a", "one"),
        ("again-a", "one"),
        ("b", "two"),
    ] {
        s.register_adapter(name, AdapterContent::new(content, 100))
            .unwrap();
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
fn failed_load_fails_only_the_requests_that_named_it_and_is_tried_again() {
    let mut s = scheduler(|_| ());
    let bad = s
        .register_adapter("bad", AdapterContent::new("h1", 100))
        .unwrap();
    s.submit(request(&[1], &[("bad", 1.0)], 3)).unwrap();
    s.submit(request(&[1], &[], 3)).unwrap();
    let first = s.schedule();
    assert_eq!(first.loads.len(), 1);
    commit(&mut s, &first);
    let failure = Failure::new(std::io::Error::other("gone"));
    s.adapter_load_failed(bad, &failure).unwrap();
    s.check_invariants();
    assert_eq!(
        failure.error::<std::io::Error>().unwrap().to_string(),
        "gone"
    );
    assert_eq!(finishes(&mut s), [(0, FinishReason::Error(failure))]);
    assert_eq!(s.adapters()[0].num_load_failures, 1);
    assert_eq!(s.adapters()[0].state, "failed");
    s.submit(request(&[1], &[("bad", 1.0)], 3)).unwrap();
    drain(&mut s);
    assert_eq!(finishes(&mut s).len(), 2);
}

#[test]
fn waiting_for_a_load_lets_others_pass_a_bounded_number_of_times() {
    let mut s = scheduler(|c| c.max_overtakes = 3);
    let slow = s
        .register_adapter("slow", AdapterContent::new("h1", 100))
        .unwrap();
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
fn warm_adapter_is_resident_before_its_first_request() {
    let mut s = scheduler(|_| ());
    s.register_adapter("a", AdapterContent::new("h1", 300))
        .unwrap();
    assert_eq!(s.warm_adapter("a"), Ok(false));
    assert_eq!(s.warm_adapter("a"), Ok(false));
    step(&mut s);
    assert_eq!((state_of(&s, "a"), s.num_prefetches()), ("resident", 0));
    assert_eq!(s.warm_adapter("a"), Ok(true));
    let id = s.submit(request(&[1], &[("a", 1.0)], 1)).unwrap();
    assert!(s.has_its_adapters(id));
    let planned = s.schedule();
    let admitted: Vec<_> = planned.admitted.iter().map(|a| a.request).collect();
    assert_eq!((planned.loads.len(), admitted), (0, vec![id]));
}

#[test]
fn warm_adapter_takes_no_memory_that_a_request_waits_for() {
    let mut s = scheduler(|c| (c.num_pages, c.prefix_caching) = (8, false));
    s.register_adapter("a", AdapterContent::new("h1", 400))
        .unwrap();
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
        s.register_adapter(name, AdapterContent::new(name, 500))
            .unwrap();
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
    assert!(s.stats().num_adapter_evictions >= 6);
    assert_eq!(s.stats().num_pinned_pages, 5);
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
        s.register_adapter(name, AdapterContent::new(name, nbytes))
            .unwrap();
    }
    let message = |error: Error| error.to_string();
    assert!(message(s.pin_adapter("big", true).unwrap_err()).contains("may take 8 and take 0"));
    let large = s.submit(request(&[1; 40], &[], 10)).unwrap();
    let refused = message(s.pin_adapter("a", true).unwrap_err());
    assert!(
        refused.contains("request 0 needs the memory: 13 pages"),
        "{refused}"
    );
    s.finish(large, FinishReason::Abort);
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
    assert_eq!(s.stats().num_pinned_pages, 0);
    s.submit(request(&[1; 40], &[], 10)).unwrap();
    drain(&mut s);
}

#[test]
fn adapter_with_two_names_stays_until_both_let_it_go() {
    let mut s = scheduler(|_| ());
    for name in ["a", "alias"] {
        s.register_adapter(name, AdapterContent::new("h1", 300))
            .unwrap();
        s.pin_adapter(name, true).unwrap();
        s.pin_adapter(name, true).unwrap();
    }
    assert_eq!(s.stats().num_pinned_pages, 3);
    s.unregister_adapter("alias").unwrap();
    assert_eq!(s.stats().num_pinned_pages, 3);
    s.pin_adapter("a", false).unwrap();
    assert_eq!(s.stats().num_pinned_pages, 0);
}

#[test]
fn adapters_turn_over_once_not_all_fit_or_one_was_evicted() {
    let mut s = scheduler(|config| (config.num_pages, config.page_nbytes) = (4, 100));
    let register = |s: &mut Scheduler, name: &str, num_pages: usize| {
        let content = AdapterContent::new(name, num_pages * 100);
        s.register_adapter(name, content).unwrap();
    };
    register(&mut s, "a", 2);
    register(&mut s, "b", 2);
    assert!(!s.has_adapter_turnover(), "both fit at once");
    register(&mut s, "c", 1);
    assert!(s.has_adapter_turnover());
    s.unregister_adapter("c").unwrap();
    assert!(!s.has_adapter_turnover());
    for name in ["a", "b"] {
        s.submit(request(&[1], &[(name, 1.0)], 1)).unwrap();
        drain(&mut s);
    }
    assert_eq!(s.stats().num_adapter_evictions, 1, "for the KV cache of b");
    assert!(s.has_adapter_turnover());
}

#[test]
fn adapters_that_run_at_once_stay_within_their_bytes() {
    let mut s = scheduler(|c| (c.max_running_adapter_pages, c.num_pages) = (4, 40));
    for (name, nbytes) in [("a", 200), ("b", 200), ("c", 200), ("large", 600)] {
        let content = AdapterContent::new(name, nbytes);
        s.register_adapter(name, content).unwrap();
    }
    let mut adapter_of = BTreeMap::new();
    for name in ["large", "a", "b", "c", "a"] {
        let submitted = s.submit(request(&[1, 2], &[(name, 1.0)], 2));
        adapter_of.insert(submitted.unwrap().0, name);
    }
    s.submit(request(&[1], &[], 2)).unwrap();
    let (mut began, mut most) = (BTreeSet::new(), 0);
    while s.has_work() {
        if let Some(batch) = step(&mut s) {
            let at_once = batch.request_ids.iter().filter_map(|id| adapter_of.get(id));
            let at_once: BTreeSet<_> = at_once.copied().collect();
            let is_alone = at_once == BTreeSet::from(["large"]);
            assert!(
                is_alone || at_once.len() <= 2 && !at_once.contains("large"),
                "{at_once:?}"
            );
            most = most.max(at_once.len());
            began.extend(batch.request_ids);
        }
    }
    assert_eq!(
        (began.len(), most),
        (6, 2),
        "everybody ran, and not one by one"
    );
}
