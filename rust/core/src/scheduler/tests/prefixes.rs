//! KV found again: by whom, under which adapter.

use super::*;

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
        cached.extend(num_cached(&mut s));
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
        cached.extend(num_cached(&mut s));
        s.unregister_adapter("a").unwrap();
    }
    assert_eq!(cached, [0, 0, 8]);
}
