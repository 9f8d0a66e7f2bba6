//! One pool for KV and adapters: refusals, preemption, eviction, moves.

use super::*;

#[test]
fn request_that_could_never_fit_is_refused_with_what_it_needs() {
    let mut s = scheduler(|_| ());
    s.register_adapter("a", AdapterContent::new("h1", 950))
        .unwrap();
    let message = s
        .submit(request(&[1; 10], &[("a", 1.0)], 20))
        .unwrap_err()
        .to_string();
    assert_eq!(
        message,
        "request needs 1800 bytes (8 pages of KV cache, 10 pages of adapters), the pool has 1600 bytes (16 pages); lower max_tokens or raise the memory budget"
    );
    let too_large = s
        .register_adapter("b", AdapterContent::new("h2", 1600))
        .unwrap_err();
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
    s.register_adapter("own", AdapterContent::new("h1", 300))
        .unwrap();
    s.register_adapter("pinned", AdapterContent::new("h2", 500))
        .unwrap();
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
fn running_sequences_are_preempted_before_the_next_request_loses_its_adapter() {
    let mut s = scheduler(|c| (c.num_pages, c.prefix_caching) = (8, false));
    s.register_adapter("a", AdapterContent::new("h1", 300))
        .unwrap();
    for _ in 0..2 {
        s.submit(request(&[1; 3], &[], 16)).unwrap();
    }
    step(&mut s);
    s.submit(request(&[2; 16], &[("a", 1.0)], 4)).unwrap();
    while s.stats().num_preemptions == 0 {
        assert!(step(&mut s).is_some());
    }
    assert_eq!(
        (s.stats().num_adapter_loads, s.stats().num_adapter_evictions),
        (1, 0)
    );
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
fn evicted_adapter_is_reloaded_on_next_request() {
    let mut s = scheduler(|c| c.prefix_caching = false);
    s.register_adapter("a", AdapterContent::new("h1", 1000))
        .unwrap();
    s.register_adapter("b", AdapterContent::new("h2", 1000))
        .unwrap();
    for name in ["a", "b", "a"] {
        s.submit(request(&[1, 2], &[(name, 1.0)], 1)).unwrap();
        drain(&mut s);
    }
    assert_eq!(
        (s.stats().num_adapter_loads, s.stats().num_adapter_evictions),
        (3, 2)
    );
    assert_eq!(s.adapters()[1].state, "registered");
}

#[test]
fn idle_extents_move_to_make_room_and_running_ones_stay() {
    let mut s = scheduler(|c| c.prefix_caching = false);
    for (index, name) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
        s.register_adapter(name, AdapterContent::new(&format!("h{index}"), 300))
            .unwrap();
    }
    s.register_adapter("big", AdapterContent::new("big", 600))
        .unwrap();
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
    assert_eq!(s.stats().num_adapter_evictions, 0);
}

#[test]
fn adapters_beyond_the_slots_take_turns() {
    let mut s = scheduler(|c| c.max_num_slots = 2);
    for name in ["a", "b", "c"] {
        s.register_adapter(name, AdapterContent::new(name, 100))
            .unwrap();
        s.submit(request(&[1, 2, 3], &[(name, 1.0)], 3)).unwrap();
    }
    drain(&mut s);
    let stats = s.stats();
    assert_eq!(
        (stats.num_resident_adapters, stats.num_adapter_evictions),
        (2, 1)
    );
    let three = [("a", 1.0), ("b", 1.0), ("c", 1.0)];
    let refused = s.submit(request(&[1], &three, 1)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "request names 3 adapters, at most 2 can be resident at once"
    );
}
