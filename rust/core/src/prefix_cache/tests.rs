//! KV blocks published and found again by whose they are, adapters and tokens.

use super::*;
use crate::ids::{AdapterKey, CacheScope};
use std::hash::{BuildHasherDefault, Hasher};

/// Every block has the same hash.
#[derive(Default)]
struct Colliding;

impl Hasher for Colliding {
    fn write(&mut self, _: &[u8]) {}

    fn finish(&self) -> u64 {
        7
    }
}

fn identity(content_hash: &str, weight: f32) -> PrefixIdentity {
    acting_from(0, content_hash, weight)
}

fn acting_from(first_token: usize, content_hash: &str, weight: f32) -> PrefixIdentity {
    let adapter = ActingAdapter {
        key: AdapterKey::new(content_hash),
        weight_bits: weight.to_bits(),
        first_token,
    };
    PrefixIdentity::new(CacheScope::default(), [adapter])
}

fn scoped(tenant: &str, salt: &str) -> PrefixIdentity {
    let scope = CacheScope {
        tenant: tenant.into(),
        salt: salt.into(),
    };
    PrefixIdentity::new(scope, [])
}

/// Publishes `tokens` in blocks of 2 into pages from `first_page` on.
fn publish<S: BuildHasher>(
    cache: &mut PrefixCache<S>,
    identity: &PrefixIdentity,
    tokens: &[i32],
    first_page: u32,
) {
    let mut parent = Parent::Root(identity.scope.clone());
    for index in 0..tokens.len() / 2 {
        let page = PageId(first_page + index as u32);
        let content = Content::of_block(identity, tokens, index, 2);
        match cache.publish(&parent, content, page) {
            Published::Inserted(block) | Published::Existing(block) => {
                parent = Parent::Block(block);
            }
            Published::Collision => break,
        }
    }
}

fn pages(found: &[BlockRef]) -> Vec<u32> {
    found.iter().map(|block| block.page.0).collect()
}

#[test]
fn prefix_is_found_block_by_block_and_never_the_last_token() {
    let mut cache = PrefixCache::new(8, 2);
    let base = PrefixIdentity::default();
    publish(&mut cache, &base, &[1, 2, 3, 4], 0);
    assert_eq!(pages(&cache.find(&base, &[1, 2, 3, 4, 5])), [0, 1]);
    assert_eq!(pages(&cache.find(&base, &[1, 2, 3, 4])), [0]);
    assert_eq!(pages(&cache.find(&base, &[1, 2, 9, 4, 5])), [0]);
    assert_eq!(pages(&cache.find(&base, &[3, 4, 5])), [] as [u32; 0]);
}

#[test]
fn prefix_of_another_adapter_or_weight_is_not_found() {
    let mut cache = PrefixCache::new(8, 2);
    publish(&mut cache, &identity("aa", 1.0), &[1, 2], 0);
    assert_eq!(pages(&cache.find(&identity("aa", 1.0), &[1, 2, 3])), [0]);
    for other in [
        identity("bb", 1.0),
        identity("aa", 0.5),
        PrefixIdentity::default(),
    ] {
        assert!(cache.find(&other, &[1, 2, 3]).is_empty());
    }
}

#[test]
fn prefix_of_another_tenant_or_salt_is_not_found() {
    let scopes = [("", ""), ("a", ""), ("", "a"), ("ab", "c"), ("a", "bc")];
    let mut cache = PrefixCache::new(8, 2);
    for (page, (tenant, salt)) in scopes.into_iter().enumerate() {
        let own = scoped(tenant, salt);
        assert!(cache.find(&own, &[1, 2, 3]).is_empty());
        publish(&mut cache, &own, &[1, 2], page as u32);
        assert_eq!(pages(&cache.find(&own, &[1, 2, 3])), [page as u32]);
    }
}

#[test]
fn blocks_before_an_adapter_acts_are_shared_and_those_from_there_on_are_not() {
    let mut cache = PrefixCache::new(8, 2);
    let (base, tokens) = (PrefixIdentity::default(), [1, 2, 3, 4, 5, 6, 7]);
    let from_fourth = acting_from(3, "aa", 1.0);
    publish(&mut cache, &from_fourth, &tokens, 0);
    assert_eq!(pages(&cache.find(&from_fourth, &tokens)), [0, 1, 2]);
    for other in [
        base.clone(),
        acting_from(2, "aa", 1.0),
        acting_from(3, "aa", 0.5),
        acting_from(3, "bb", 1.0),
        acting_from(4, "aa", 1.0),
    ] {
        assert_eq!(pages(&cache.find(&other, &tokens)), [0], "{other:?}");
    }
    assert!(cache.find(&acting_from(1, "aa", 1.0), &tokens).is_empty());
    publish(&mut cache, &base, &[1, 2, 3, 4], 3);
    assert_eq!(
        pages(&cache.find(&acting_from(4, "bb", 1.0), &tokens)),
        [0, 4]
    );
}

#[test]
fn blocks_are_hashed_with_a_key_of_their_own_cache() {
    let root = Parent::Root(Arc::default());
    let hash = |cache: PrefixCache| cache.hasher.hash_one((&root, &[1, 2]));
    assert_ne!(
        hash(PrefixCache::new(8, 2)),
        hash(PrefixCache::new(8, 2)),
        "nobody can compute what collides"
    );
}

#[test]
fn colliding_hashes_miss_instead_of_returning_wrong_blocks() {
    let mut cache = PrefixCache::with_hasher(8, 2, BuildHasherDefault::<Colliding>::default());
    let base = PrefixIdentity::default();
    publish(&mut cache, &base, &[1, 2], 0);
    assert!(cache.find(&base, &[8, 9, 1]).is_empty());
    assert!(cache.find(&identity("aa", 1.0), &[1, 2, 3]).is_empty());
    assert_eq!(
        cache.publish(
            &Parent::Root(base.scope.clone()),
            Content::of_block(&base, &[8, 9], 0, 2),
            PageId(1)
        ),
        Published::Collision
    );
    assert_eq!(pages(&cache.find(&base, &[1, 2, 3])), [0]);
}

#[test]
fn evicting_a_parent_evicts_its_descendants() {
    let mut cache = PrefixCache::new(8, 2);
    let base = PrefixIdentity::default();
    publish(&mut cache, &base, &[1, 2, 3, 4, 5, 6], 0);
    publish(&mut cache, &base, &[1, 2, 7, 8], 4);
    for (tick, page) in [2, 1, 5, 0].into_iter().enumerate() {
        cache.mark_idle(PageId(page), tick as u64);
    }
    cache.check_invariants();
    assert_eq!(cache.oldest_idle(), Some((PageId(2), 0)));
    let mut evicted = cache.evict(PageId(1));
    evicted.sort();
    assert_eq!(evicted, [PageId(1), PageId(2)]);
    cache.check_invariants();
    assert_eq!(pages(&cache.find(&base, &[1, 2, 7, 8, 9])), [0, 5]);
    assert_eq!(cache.evict(PageId(0)).len(), 2);
    cache.check_invariants();
}
