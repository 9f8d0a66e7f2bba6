//! Loads that are never answered stop only those that need what they hold.

use super::*;

/// Registers an adapter of `num_pages`, asks for it and has its load begin, to be late.
fn begin_late_load(s: &mut Scheduler, name: &str, num_pages: usize) -> AdapterId {
    let adapter = s
        .register_adapter(name, AdapterContent::new(name, num_pages * 100))
        .unwrap();
    s.submit(request(&[1], &[(name, 1.0)], 1)).unwrap();
    let planned = s.schedule();
    assert_eq!(planned.loads.len(), 1, "{name} is loaded");
    commit(s, &planned);
    s.adapter_load_late(adapter).unwrap();
    adapter
}

/// Steps until nothing is to be computed; loads stay unanswered.
fn run_out(s: &mut Scheduler) {
    for _ in 0..200 {
        let planned = s.schedule();
        s.check_invariants();
        commit(s, &planned);
        if planned.batch.is_none() {
            return;
        }
    }
    panic!("the work ends: {:?}", s.stats());
}

#[test]
fn waiting_for_a_late_load_lets_any_number_pass() {
    let mut s = scheduler(|c| (c.max_overtakes, c.max_num_seqs) = (1, 1));
    let late = begin_late_load(&mut s, "late", 1);
    for _ in 0..6 {
        s.submit(request(&[1], &[], 1)).unwrap();
    }
    run_out(&mut s);
    assert_eq!(finishes(&mut s).len(), 6);
    s.adapter_loaded(late).unwrap();
    run_out(&mut s);
    assert_eq!(finishes(&mut s), [(0, FinishReason::Length)]);
}

#[test]
fn waiting_for_late_loads_takes_no_place_of_the_lookahead() {
    let mut s = scheduler(|c| (c.max_overtakes, c.lookahead) = (0, 2));
    for name in ["l1", "l2", "l3"] {
        begin_late_load(&mut s, name, 1);
    }
    s.register_adapter("a", AdapterContent::new("a", 100))
        .unwrap();
    s.submit(request(&[1], &[("a", 1.0)], 1)).unwrap();
    step(&mut s);
    step(&mut s);
    assert_eq!(finishes(&mut s), [(3, FinishReason::Length)]);
}

#[test]
fn a_request_too_large_beside_a_late_load_lets_others_pass_until_the_answer() {
    let mut s = scheduler(|_| ());
    let late = begin_late_load(&mut s, "late", 10);
    s.submit(request(&[1; 40], &[], 1)).unwrap();
    s.submit(request(&[1; 8], &[], 3)).unwrap();
    run_out(&mut s);
    assert_eq!(finishes(&mut s), [(2, FinishReason::Length)]);
    s.adapter_loaded(late).unwrap();
    run_out(&mut s);
    assert_eq!(finishes(&mut s).len(), 2);
}

#[test]
fn a_sequence_that_outgrows_what_late_loads_leave_makes_way() {
    let mut s = scheduler(|c| c.max_num_seqs = 2);
    s.submit(request(&[1; 8], &[], 50)).unwrap();
    let late = begin_late_load(&mut s, "late", 10);
    run_out(&mut s);
    let stats = s.stats();
    assert_eq!((stats.num_running, stats.num_kv_pages), (0, 0));
    s.submit(request(&[2; 8], &[], 3)).unwrap();
    run_out(&mut s);
    assert_eq!(finishes(&mut s), [(2, FinishReason::Length)]);
    s.adapter_load_failed(late, &Failure::new(std::io::Error::other("gone")))
        .unwrap();
    run_out(&mut s);
    assert_eq!(finishes(&mut s).len(), 2, "the load's and the long one's");
}

#[test]
fn resident_adapters_of_a_stranded_request_make_room_for_others() {
    let mut s = scheduler(|_| ());
    s.register_adapter("resident", AdapterContent::new("resident", 600))
        .unwrap();
    s.submit(request(&[1], &[("resident", 1.0)], 1)).unwrap();
    drain(&mut s);
    let late = s
        .register_adapter("late", AdapterContent::new("late", 600))
        .unwrap();
    s.submit(request(&[1], &[("resident", 1.0), ("late", 1.0)], 1))
        .unwrap();
    let planned = s.schedule();
    commit(&mut s, &planned);
    s.adapter_load_late(late).unwrap();
    finishes(&mut s);
    s.submit(request(&[1; 36], &[], 1)).unwrap();
    run_out(&mut s);
    assert_eq!(finishes(&mut s), [(2, FinishReason::Length)]);
    s.adapter_loaded(late).unwrap();
    drain(&mut s);
    assert_eq!(finishes(&mut s), [(1, FinishReason::Length)]);
}

#[test]
fn a_prefetch_too_large_beside_a_late_load_lets_smaller_ones_pass() {
    let mut s = scheduler(|_| ());
    begin_late_load(&mut s, "late", 10);
    s.register_adapter("large", AdapterContent::new("large", 800))
        .unwrap();
    s.register_adapter("small", AdapterContent::new("small", 100))
        .unwrap();
    s.warm_adapter("large").unwrap();
    s.warm_adapter("small").unwrap();
    step(&mut s);
    assert_eq!((state_of(&s, "small"), s.num_prefetches()), ("resident", 1));
}

#[test]
fn only_a_load_under_way_can_be_late() {
    let mut s = scheduler(|_| ());
    let adapter = s
        .register_adapter("a", AdapterContent::new("a", 100))
        .unwrap();
    let refused = Err(Error::NotLoading { id: adapter.0 });
    assert_eq!(s.adapter_load_late(adapter), refused);
    s.warm_adapter("a").unwrap();
    step(&mut s);
    assert_eq!(s.adapter_load_late(adapter), refused);
}
