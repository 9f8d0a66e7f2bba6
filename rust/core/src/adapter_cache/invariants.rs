//! What holds of names, adapters, users and slots, checked by the tests after each operation.

use std::collections::HashMap;

use super::{AdapterCache, AdapterState};
use crate::ids::AdapterId;

impl AdapterCache {
    pub fn check_invariants(&self) {
        assert_eq!(
            self.entries.len(),
            self.by_key.len(),
            "one entry per content"
        );
        for (&adapter, entry) in &self.entries {
            assert_eq!(self.by_key.get(&entry.content.key), Some(&adapter));
            let is_loading = matches!(entry.state, AdapterState::Loading(_));
            assert!(
                !entry.names.is_empty() || entry.users > 0 || is_loading,
                "no entry is forgotten late"
            );
            if let AdapterState::Resident(slot) | AdapterState::Loading(slot) = entry.state {
                let occupant = self
                    .slots
                    .occupant(slot)
                    .expect("a loaded adapter is in its slot");
                assert_eq!(
                    (occupant.adapter, occupant.is_loaded),
                    (adapter, !is_loading)
                );
                assert!(occupant.num_running <= entry.users, "who runs is a user");
                assert_eq!(
                    occupant.is_pinned,
                    entry.is_pinned(),
                    "a slot knows whether it is pinned"
                );
            }
            for (names, is_unloading) in [(&entry.names, false), (&entry.unloading, true)] {
                for name in names {
                    let bound = &self.names[name];
                    assert_eq!((bound.adapter, bound.is_unloading), (adapter, is_unloading));
                }
            }
        }
        for (&adapter, entry) in &self.entries {
            let num_pins = self
                .names
                .values()
                .filter(|b| b.adapter == adapter && b.is_pinned)
                .count();
            assert_eq!(entry.num_pins, num_pins, "pins are names");
        }
        let pinned = self.entries.values().filter(|entry| entry.is_pinned());
        assert_eq!(self.pinned.num_adapters, pinned.clone().count());
        let num_pages: usize = pinned.map(|entry| entry.num_pages).sum();
        assert_eq!(self.pinned.num_pages, num_pages, "pinned pages are counted");
        let num_pages: usize = self.entries.values().map(|entry| entry.num_pages).sum();
        assert_eq!(self.num_pages, num_pages, "known pages are counted");
        let bound: usize = self
            .entries
            .values()
            .map(|e| e.names.len() + e.unloading.len())
            .sum();
        assert_eq!(bound, self.names.len(), "every name belongs to an entry");
        self.slots.check_invariants();
    }

    /// Checks users and running sequences against `uses`, counted from the requests themselves.
    pub fn check_uses(&self, uses: &HashMap<AdapterId, (usize, usize)>) {
        for (adapter, entry) in &self.entries {
            let num_running = match entry.state {
                AdapterState::Resident(slot) => {
                    self.slots.occupant(slot).map_or(0, |o| o.num_running)
                }
                _ => 0,
            };
            let (users, running) = uses.get(adapter).copied().unwrap_or_default();
            assert_eq!(
                (entry.users, num_running),
                (users, running),
                "users of {adapter:?} are its requests"
            );
        }
        assert!(
            uses.keys()
                .all(|adapter| self.entries.contains_key(adapter)),
            "used adapters are known"
        );
    }
}
