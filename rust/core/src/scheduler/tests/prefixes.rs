//! KV found again: by whom, under which adapter.

use super::*;
use crate::request::PromptRows;

#[test]
fn second_request_reuses_the_prefix_but_recomputes_its_last_token() {
    let mut s = scheduler(|_| ());
    let mut cached = Vec::new();
    for _ in 0..2 {
        s.submit(request(&[1; 8], &[], 1)).unwrap();
        cached.extend(num_cached(&mut s));
    }
    assert_eq!(cached, [0, 4]);
}

#[test]
fn a_prompt_cached_in_one_scope_is_computed_again_in_another() {
    let scope = |tenant: &str, salt: &str| CacheScope {
        tenant: tenant.into(),
        salt: salt.into(),
    };
    let mut s = scheduler(|_| ());
    for name in ["a", "also-a"] {
        s.register_adapter(name, AdapterContent::new("same content", 100))
            .unwrap();
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
        cached.extend(num_cached(&mut s));
    }
    assert_eq!(cached, [0, 0, 0, 0, 8, 8]);
}

#[test]
fn name_bound_to_other_content_never_meets_the_old_prefix() {
    let mut s = scheduler(|_| ());
    let mut cached = Vec::new();
    for content_hash in ["h1", "h2", "h1"] {
        s.register_adapter("a", AdapterContent::new(content_hash, 100))
            .unwrap();
        s.submit(request(&[1; 9], &[("a", 1.0)], 1)).unwrap();
        cached.extend(num_cached(&mut s));
        s.unregister_adapter("a").unwrap();
    }
    assert_eq!(cached, [0, 0, 8]);
}

#[test]
fn an_adapter_invoked_late_shares_what_is_before_with_the_base_and_with_its_like() {
    let mut s = scheduler(|_| ());
    for name in ["a", "b"] {
        let content = AdapterContent {
            invocation: [7, 8].into(),
            ..AdapterContent::new(name, 100)
        };
        s.register_adapter(name, content).unwrap();
    }
    let mut prompt = vec![1; 8];
    let mut cached = |adapter: Option<&str>, added: &[i32]| {
        prompt.extend(added);
        let adapters: Vec<_> = adapter.map(|name| (name, 1.0)).into_iter().collect();
        s.submit(request(&prompt, &adapters, 1)).unwrap();
        num_cached(&mut s)[0]
    };
    assert_eq!(cached(None, &[1]), 0);
    assert_eq!(
        cached(Some("a"), &[7, 8, 2, 2]),
        8,
        "what the base computed"
    );
    assert_eq!(cached(Some("b"), &[]), 8);
    assert_eq!(cached(Some("a"), &[3, 3, 3, 3]), 12, "its own, too");
    assert_eq!(
        cached(Some("a"), &[7, 8, 3]),
        8,
        "the last invocation counts"
    );
    assert_eq!(
        cached(None, &[]),
        16,
        "what it computed before its invocation"
    );
    assert_eq!(
        cached(Some("b"), &[3, 3]),
        16,
        "the base's, up to the invocation"
    );
}

#[test]
fn an_adapter_that_the_prompt_does_not_invoke_leaves_the_base() {
    let mut s = scheduler(|_| ());
    let content = AdapterContent {
        invocation: [7, 8].into(),
        ..AdapterContent::new("h", 100)
    };
    s.register_adapter("a", content).unwrap();
    for prompt in [&[8, 7][..], &[7], &[1, 2, 3]] {
        let uninvoked = request(prompt, &[("a", 1.0)], 1);
        let needed = NewRequest {
            needs_adapter: true,
            ..uninvoked.clone()
        };
        assert_eq!(s.submit(needed), Err(Error::OnlyBaseModelLeft));
        s.submit(uninvoked).unwrap();
        let batch = step(&mut s).unwrap();
        assert!(batch.seg_start.is_empty());
    }
    assert_eq!(state_of(&s, "a"), "registered");
    assert_eq!(s.adapters()[0].num_uninvoked, 3);
}

#[test]
fn who_wants_rows_of_a_prompt_computes_them_and_finds_what_is_before_them() {
    let mut scheduler = scheduler(|config| config.max_batched_tokens = 5);
    let prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13];
    let rows = |prompt_rows| NewRequest {
        prompt_rows,
        ..request(&prompt, &[], 0)
    };
    scheduler.submit(request(&prompt, &[], 1)).unwrap();
    assert_eq!(num_cached(&mut scheduler), [0]);
    for (prompt_rows, cached) in [(PromptRows::Last, 8), (PromptRows::All, 0)] {
        scheduler.submit(rows(prompt_rows)).unwrap();
        assert_eq!(num_cached(&mut scheduler), [cached]);
    }
    let ends = finishes(&mut scheduler).into_iter();
    assert!(
        ends.map(|(_, finish)| finish)
            .all(|finish| finish == FinishReason::Length)
    );
    scheduler.submit(rows(PromptRows::All)).unwrap();
    let chunks: Vec<_> = std::iter::from_fn(|| step(&mut scheduler)).collect();
    let spans = chunks.iter().flat_map(|batch| &batch.hidden_spans);
    let spans: Vec<_> = spans.map(|span| (span.position, span.num_rows)).collect();
    assert_eq!(spans, [(0, 5), (5, 4)]);
    assert!(chunks.iter().all(|batch| batch.logits_indices.is_empty()));
}
