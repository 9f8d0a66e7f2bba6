use super::*;
use crate::slot_table::Shield;

fn register(cache: &mut AdapterCache, name: &str, content_hash: &str) -> Result<AdapterId, Error> {
    cache.register(name, AdapterContent::new(content_hash, 100), 1)
}

#[test]
fn names_of_one_content_share_an_adapter() {
    let mut cache = AdapterCache::default();
    let a = register(&mut cache, "a", "h1").unwrap();
    assert_eq!(register(&mut cache, "b", "h1"), Ok(a));
    assert_eq!(register(&mut cache, "a", "h1"), Ok(a));
    assert!(matches!(
        register(&mut cache, "a", "h2"),
        Err(Error::AdapterNameTaken { .. })
    ));
    assert_eq!(cache.unregister("a"), Ok(None));
    assert_eq!(cache.resolve("b"), Ok(a));
    cache.check_invariants();
}

#[test]
fn bad_names_are_refused() {
    let mut cache = AdapterCache::default();
    for name in ["", "a/b", "../x", "a b", "é"] {
        assert!(
            matches!(
                register(&mut cache, name, "h"),
                Err(Error::BadAdapterName { .. })
            ),
            "{name}"
        );
    }
    assert!(register(&mut cache, "Aa0_-.:", "h").is_ok());
}

#[test]
fn adapter_in_use_unloads_once_its_last_request_ends() {
    let mut cache = AdapterCache::default();
    let a = register(&mut cache, "a", "h1").unwrap();
    cache.add_user(a);
    cache.begin_load(a, SlotId(0));
    cache.finish_load(a, 1).unwrap();
    assert_eq!(cache.unregister("a"), Ok(None));
    assert!(matches!(
        cache.resolve("a"),
        Err(Error::AdapterUnloading { .. })
    ));
    assert_eq!(cache.list()[0].state, "unloading");
    assert!(matches!(
        cache.unregister("a"),
        Err(Error::AdapterNotFound { .. })
    ));
    assert_eq!(cache.remove_user(a), Some(SlotId(0)));
    assert!(matches!(
        cache.resolve("a"),
        Err(Error::AdapterNotFound { .. })
    ));
    cache.check_invariants();
}

#[test]
fn name_being_unloaded_can_be_taken_by_other_content_or_come_back() {
    let mut cache = AdapterCache::default();
    let old = register(&mut cache, "a", "h1").unwrap();
    cache.add_user(old);
    cache.unregister("a").unwrap();
    let new = register(&mut cache, "a", "h2").unwrap();
    assert_ne!(old, new);
    assert_eq!(cache.resolve("a"), Ok(new));
    cache.unregister("a").unwrap();
    assert_eq!(register(&mut cache, "a", "h1"), Ok(old));
    cache.remove_user(old);
    assert_eq!(cache.resolve("a"), Ok(old));
    cache.check_invariants();
}

#[test]
fn load_nobody_wants_any_more_frees_its_slot_when_answered() {
    let mut cache = AdapterCache::default();
    let a = register(&mut cache, "a", "h1").unwrap();
    cache.begin_load(a, SlotId(0));
    assert_eq!(cache.unregister("a"), Ok(None));
    assert_eq!(cache.finish_load(a, 1), Ok(Some(SlotId(0))));
    assert_eq!(cache.finish_load(a, 1), Err(Error::NotLoading { id: a.0 }));
    cache.check_invariants();
}

#[test]
fn shield_lasts_one_round_and_use_lasts_until_released() {
    let mut cache = AdapterCache::default();
    let a = register(&mut cache, "a", "h1").unwrap();
    cache.begin_load(a, SlotId(0));
    cache.slots.begin_round();
    assert!(!cache.slots.is_evictable(SlotId(0), Shield::Ignore));
    cache.finish_load(a, 1).unwrap();
    cache.shield(a);
    assert!(!cache.slots.is_evictable(SlotId(0), Shield::Respect));
    assert!(cache.slots.is_evictable(SlotId(0), Shield::Ignore));
    cache.slots.begin_round();
    assert_eq!(cache.acquire(a), SlotId(0));
    assert!(!cache.slots.is_evictable(SlotId(0), Shield::Ignore));
    cache.slots.release(SlotId(0), 2);
    assert_eq!(cache.slots.evictable(Shield::Respect).count(), 1);
    cache.evict(SlotId(0));
    assert_eq!(cache.entry(a).state, AdapterState::Registered);
}

#[test]
fn replaced_adapter_stays_for_its_users_and_its_pin_goes_over() {
    let mut cache = AdapterCache::default();
    let old = register(&mut cache, "a", "h1").unwrap();
    cache.set_pinned("a", true).unwrap();
    cache.add_user(old);
    cache.begin_load(old, SlotId(0));
    cache.finish_load(old, 1).unwrap();
    let (new, slot) = cache
        .replace("a", AdapterContent::new("h2", 100), 3)
        .unwrap();
    assert_eq!((cache.resolve("a"), slot), (Ok(new), None));
    assert_ne!(old, new);
    let pinned = Pinned {
        num_adapters: 1,
        num_pages: 3,
    };
    assert_eq!(cache.pinned(), pinned);
    assert_eq!(cache.list().len(), 1);
    cache.check_invariants();
    assert_eq!(cache.remove_user(old), Some(SlotId(0)));
    assert!(cache.get(old).is_none());
    cache.check_invariants();
}

#[test]
fn replacing_frees_what_nobody_uses_and_leaves_what_others_name() {
    let mut cache = AdapterCache::default();
    let old = register(&mut cache, "a", "h1").unwrap();
    cache.begin_load(old, SlotId(0));
    cache.finish_load(old, 1).unwrap();
    let mut replace = |name, content_hash| {
        let replaced = cache.replace(name, AdapterContent::new(content_hash, 100), 1);
        cache.check_invariants();
        replaced.unwrap()
    };
    assert_eq!(replace("a", "h1"), (old, None));
    let (new, slot) = replace("a", "h2");
    assert_eq!(slot, Some(SlotId(0)));
    let (unknown, _) = replace("b", "h2");
    assert_eq!(unknown, new);
    let (other, slot) = replace("a", "h3");
    assert_eq!(slot, None);
    assert_eq!(
        (cache.resolve("a"), cache.resolve("b")),
        (Ok(other), Ok(new))
    );
}
