//! `AdapterCache`: which adapters are known, which are resident, and who uses them.
//!
//! ```text
//! registered → loading → resident → (evicted =) registered
//!                      ↘ failed → (asked for again =) registered
//! ```
//! An adapter is its content hash; several names may share one. It is forgotten once it has neither names nor users.

use std::collections::HashMap;

use crate::error::Error;
use crate::ids::{AdapterId, AdapterKey, SlotId};
use crate::slot_table::{Shield, SlotTable};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterState {
    Registered,
    Loading(SlotId),
    Resident(SlotId),
    Failed,
}

/// A registered name, as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterInfo {
    pub name: String,
    pub id: AdapterId,
    pub content_hash: AdapterKey,
    pub nbytes: usize,
    /// `registered`, `loading`, `resident`, `failed` or `unloading`.
    pub state: &'static str,
    pub num_running: usize,
    pub num_waiting: usize,
    /// Kept in memory under this name.
    pub is_kept: bool,
    pub num_loads: u64,
    pub num_evictions: u64,
}

#[derive(Debug)]
pub struct Entry {
    pub key: AdapterKey,
    pub nbytes: usize,
    pub num_pages: usize,
    pub state: AdapterState,
    /// Unfinished requests, waiting or running.
    pub users: usize,
    /// Names under which the operator keeps it in memory.
    num_keeps: usize,
    num_loads: u64,
    num_evictions: u64,
    names: Vec<String>,
    unloading: Vec<String>,
}

impl Entry {
    pub fn is_kept(&self) -> bool {
        self.num_keeps > 0
    }

    /// Whether it is kept under one name only.
    pub fn is_kept_once(&self) -> bool {
        self.num_keeps == 1
    }
}

#[derive(Debug)]
struct Name {
    adapter: AdapterId,
    is_unloading: bool,
    is_kept: bool,
}

#[derive(Debug, Default)]
pub struct AdapterCache {
    entries: HashMap<AdapterId, Entry>,
    by_key: HashMap<AdapterKey, AdapterId>,
    names: HashMap<String, Name>,
    pub slots: SlotTable,
    /// Adapters kept by the operator, resident or not, and the pages they need.
    kept: Kept,
    next_id: u32,
}

/// How much the operator keeps in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Kept {
    pub num_adapters: usize,
    pub num_pages: usize,
}

impl AdapterCache {
    /// Binds a name; the same name and content again is the same adapter.
    pub fn register(
        &mut self,
        name: &str,
        key: AdapterKey,
        nbytes: usize,
        num_pages: usize,
    ) -> Result<AdapterId, Error> {
        check_name(name)?;
        if let Some(bound) = self.names.get(name) {
            let (adapter, registered) = (bound.adapter, &self.entries[&bound.adapter].key);
            if !bound.is_unloading && *registered == key {
                return Ok(adapter);
            }
            if !bound.is_unloading {
                return Err(name_taken(name, registered, &key));
            }
            self.entry_mut(adapter)
                .unloading
                .retain(|other| other != name);
        }
        let adapter = self.find_or_insert(key, nbytes, num_pages);
        self.bind(name, adapter, false);
        Ok(adapter)
    }

    /// Binds a name whatever it was bound to, and keeps its pin; accepted requests keep the old adapter.
    ///
    /// Returns the slot to free if that leaves the old adapter unused.
    pub fn replace(
        &mut self,
        name: &str,
        key: AdapterKey,
        nbytes: usize,
        num_pages: usize,
    ) -> Result<(AdapterId, Option<SlotId>), Error> {
        let Some((old, is_kept)) = self.bound(name) else {
            return Ok((self.register(name, key, nbytes, num_pages)?, None));
        };
        if self.entry(old).key == key {
            return Ok((old, None));
        }
        let adapter = self.find_or_insert(key, nbytes, num_pages);
        self.entry_mut(old).names.retain(|other| other != name);
        self.bind(name, adapter, is_kept);
        if is_kept {
            self.change_keeps(old, false);
            self.change_keeps(adapter, true);
        }
        Ok((adapter, self.forget_if_unused(old)))
    }

    /// What a name that takes requests stands for, and whether it is kept in memory under it.
    pub fn bound(&self, name: &str) -> Option<(AdapterId, bool)> {
        let bound = self.names.get(name).filter(|bound| !bound.is_unloading)?;
        Some((bound.adapter, bound.is_kept))
    }

    pub fn find(&self, key: &AdapterKey) -> Option<AdapterId> {
        self.by_key.get(key).copied()
    }

    /// Unbinds a name; returns the slot to free if that leaves the adapter unused.
    pub fn unregister(&mut self, name: &str) -> Result<Option<SlotId>, Error> {
        let bound = self.names.get_mut(name).filter(|bound| !bound.is_unloading);
        let bound = bound.ok_or_else(|| Error::AdapterNotFound {
            name: name.to_owned(),
        })?;
        let adapter = bound.adapter;
        if std::mem::take(&mut bound.is_kept) {
            self.change_keeps(adapter, false);
        }
        let bound = self.names.get_mut(name);
        let bound = bound.expect("invariant: a name is unbound here only");
        let entry = self
            .entries
            .get_mut(&adapter)
            .expect("invariant: a name has an entry");
        entry.names.retain(|other| other != name);
        if entry.names.is_empty() && entry.users > 0 {
            bound.is_unloading = true;
            entry.unloading.push(name.to_owned());
        } else {
            self.names.remove(name);
        }
        Ok(self.forget_if_unused(adapter))
    }

    pub fn resolve(&self, name: &str) -> Result<AdapterId, Error> {
        match self.names.get(name) {
            None => Err(Error::AdapterNotFound {
                name: name.to_owned(),
            }),
            Some(bound) if bound.is_unloading => Err(Error::AdapterUnloading {
                name: name.to_owned(),
            }),
            Some(bound) => Ok(bound.adapter),
        }
    }

    /// Keeps the adapter in memory under this name, or no longer.
    pub fn set_kept(&mut self, name: &str, is_kept: bool) -> Result<(), Error> {
        let adapter = self.resolve(name)?;
        let bound = self.names.get_mut(name);
        let bound = bound.expect("invariant: a resolved name is bound");
        if std::mem::replace(&mut bound.is_kept, is_kept) != is_kept {
            self.change_keeps(adapter, is_kept);
        }
        Ok(())
    }

    pub fn kept(&self) -> Kept {
        self.kept
    }

    pub fn get(&self, adapter: AdapterId) -> Option<&Entry> {
        self.entries.get(&adapter)
    }

    pub fn entry(&self, adapter: AdapterId) -> &Entry {
        self.entries
            .get(&adapter)
            .expect("invariant: a used adapter is not forgotten")
    }

    /// A request was accepted; a failed load will be tried again.
    pub fn add_user(&mut self, adapter: AdapterId) {
        let entry = self.entry_mut(adapter);
        entry.users += 1;
        if entry.state == AdapterState::Failed {
            entry.state = AdapterState::Registered;
        }
    }

    /// A request ended; returns the slot to free if the adapter is now unused.
    pub fn remove_user(&mut self, adapter: AdapterId) -> Option<SlotId> {
        self.entry_mut(adapter).users -= 1;
        self.forget_if_unused(adapter)
    }

    pub fn begin_load(&mut self, adapter: AdapterId, slot: SlotId) {
        let entry = self.entry_mut(adapter);
        entry.state = AdapterState::Loading(slot);
        entry.num_loads += 1;
        let is_kept = entry.is_kept();
        self.slots.occupy(slot, adapter);
        self.slots.set_kept(slot, is_kept);
    }

    /// Returns the slot to free if nobody wants the adapter any more.
    pub fn finish_load(&mut self, adapter: AdapterId, tick: u64) -> Result<Option<SlotId>, Error> {
        let slot = self.loading_slot(adapter)?;
        self.entry_mut(adapter).state = AdapterState::Resident(slot);
        self.slots.mark_loaded(slot, tick);
        Ok(self.forget_if_unused(adapter))
    }

    /// Returns the slot to free.
    pub fn fail_load(&mut self, adapter: AdapterId) -> Result<SlotId, Error> {
        let slot = self.loading_slot(adapter)?;
        self.entry_mut(adapter).state = AdapterState::Failed;
        self.slots.vacate(slot);
        self.forget_if_unused(adapter);
        Ok(slot)
    }

    pub fn pin(&mut self, adapter: AdapterId) -> SlotId {
        let AdapterState::Resident(slot) = self.entry(adapter).state else {
            panic!("invariant: only a resident adapter is pinned");
        };
        self.slots.pin(slot);
        slot
    }

    /// The resident goes back to registered.
    pub fn evict(&mut self, slot: SlotId) {
        assert!(
            self.slots.is_evictable(slot, Shield::Ignore),
            "invariant: only an idle adapter that nobody keeps is evicted"
        );
        let adapter = self.slots.vacate(slot).adapter;
        let entry = self.entry_mut(adapter);
        entry.state = AdapterState::Registered;
        entry.num_evictions += 1;
    }

    /// Keeps the adapter resident for a waiting request until the next round.
    pub fn shield(&mut self, adapter: AdapterId) {
        if let AdapterState::Resident(slot) | AdapterState::Loading(slot) =
            self.entry(adapter).state
        {
            self.slots.shield(slot);
        }
    }

    pub fn num_registered(&self) -> usize {
        self.entries.len()
    }

    /// Adapters that have names or users: those a step may still ask to load.
    pub fn ids(&self) -> impl Iterator<Item = AdapterId> {
        self.entries.keys().copied()
    }

    /// Every name, sorted.
    pub fn list(&self) -> Vec<AdapterInfo> {
        let mut infos: Vec<_> = self
            .names
            .iter()
            .map(|(name, bound)| self.info(name, bound))
            .collect();
        infos.sort_by(|a, b| a.name.cmp(&b.name));
        infos
    }

    pub fn check_invariants(&self) {
        assert_eq!(
            self.entries.len(),
            self.by_key.len(),
            "one entry per content"
        );
        for (&adapter, entry) in &self.entries {
            assert_eq!(self.by_key.get(&entry.key), Some(&adapter));
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
                assert!(occupant.pins <= entry.users, "pins are users");
                assert_eq!(
                    occupant.is_kept,
                    entry.is_kept(),
                    "a slot knows who keeps it"
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
            let keeps = self
                .names
                .values()
                .filter(|b| b.adapter == adapter && b.is_kept)
                .count();
            assert_eq!(entry.num_keeps, keeps, "keeps are names");
        }
        let kept = self.entries.values().filter(|entry| entry.is_kept());
        assert_eq!(self.kept.num_adapters, kept.clone().count());
        let num_pages: usize = kept.map(|entry| entry.num_pages).sum();
        assert_eq!(self.kept.num_pages, num_pages, "kept pages are counted");
        let bound: usize = self
            .entries
            .values()
            .map(|e| e.names.len() + e.unloading.len())
            .sum();
        assert_eq!(bound, self.names.len(), "every name belongs to an entry");
        self.slots.check_invariants();
    }

    /// Checks users and pins against `uses`, counted from the requests themselves.
    pub fn check_uses(&self, uses: &HashMap<AdapterId, (usize, usize)>) {
        for (adapter, entry) in &self.entries {
            let pins = match entry.state {
                AdapterState::Resident(slot) => self.slots.occupant(slot).map_or(0, |o| o.pins),
                _ => 0,
            };
            let (users, running) = uses.get(adapter).copied().unwrap_or_default();
            assert_eq!(
                (entry.users, pins),
                (users, running),
                "users and pins of {adapter:?} are its requests"
            );
        }
        assert!(
            uses.keys()
                .all(|adapter| self.entries.contains_key(adapter)),
            "used adapters are known"
        );
    }

    fn bind(&mut self, name: &str, adapter: AdapterId, is_kept: bool) {
        self.entry_mut(adapter).names.push(name.to_owned());
        self.names.insert(
            name.to_owned(),
            Name {
                adapter,
                is_unloading: false,
                is_kept,
            },
        );
    }

    fn find_or_insert(&mut self, key: AdapterKey, nbytes: usize, num_pages: usize) -> AdapterId {
        if let Some(adapter) = self.find(&key) {
            return adapter;
        }
        let adapter = AdapterId(self.next_id);
        self.next_id += 1;
        let entry = Entry {
            key: key.clone(),
            nbytes,
            num_pages,
            state: AdapterState::Registered,
            users: 0,
            num_keeps: 0,
            num_loads: 0,
            num_evictions: 0,
            names: Vec::new(),
            unloading: Vec::new(),
        };
        self.entries.insert(adapter, entry);
        self.by_key.insert(key, adapter);
        adapter
    }

    fn change_keeps(&mut self, adapter: AdapterId, is_kept: bool) {
        let entry = self.entry_mut(adapter);
        let was_kept = entry.is_kept();
        entry.num_keeps = if is_kept {
            entry.num_keeps + 1
        } else {
            entry.num_keeps - 1
        };
        let (is_kept, num_pages, state) = (entry.is_kept(), entry.num_pages, entry.state);
        if was_kept == is_kept {
            return;
        }
        if is_kept {
            self.kept.num_adapters += 1;
            self.kept.num_pages += num_pages;
        } else {
            self.kept.num_adapters -= 1;
            self.kept.num_pages -= num_pages;
        }
        if let AdapterState::Resident(slot) | AdapterState::Loading(slot) = state {
            self.slots.set_kept(slot, is_kept);
        }
    }

    fn forget_if_unused(&mut self, adapter: AdapterId) -> Option<SlotId> {
        let entry = &self.entries[&adapter];
        let is_loading = matches!(entry.state, AdapterState::Loading(_));
        if !entry.names.is_empty() || entry.users > 0 || is_loading {
            return None;
        }
        let entry = self.entries.remove(&adapter)?;
        self.by_key.remove(&entry.key);
        for name in &entry.unloading {
            self.names.remove(name);
        }
        let AdapterState::Resident(slot) = entry.state else {
            return None;
        };
        self.slots.vacate(slot);
        Some(slot)
    }

    fn loading_slot(&self, adapter: AdapterId) -> Result<SlotId, Error> {
        match self.entries.get(&adapter).map(|entry| entry.state) {
            Some(AdapterState::Loading(slot)) => Ok(slot),
            _ => Err(Error::NotLoading { id: adapter.0 }),
        }
    }

    fn info(&self, name: &str, bound: &Name) -> AdapterInfo {
        let entry = self.entry(bound.adapter);
        let (state, num_running) = match entry.state {
            AdapterState::Registered => ("registered", 0),
            AdapterState::Loading(_) => ("loading", 0),
            AdapterState::Resident(slot) => {
                ("resident", self.slots.occupant(slot).map_or(0, |o| o.pins))
            }
            AdapterState::Failed => ("failed", 0),
        };
        AdapterInfo {
            name: name.to_owned(),
            id: bound.adapter,
            content_hash: entry.key.clone(),
            nbytes: entry.nbytes,
            state: if bound.is_unloading {
                "unloading"
            } else {
                state
            },
            num_running,
            num_waiting: entry.users - num_running,
            is_kept: bound.is_kept,
            num_loads: entry.num_loads,
            num_evictions: entry.num_evictions,
        }
    }

    fn entry_mut(&mut self, adapter: AdapterId) -> &mut Entry {
        self.entries
            .get_mut(&adapter)
            .expect("invariant: a used adapter is not forgotten")
    }
}

fn check_name(name: &str) -> Result<(), Error> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:".contains(&byte);
    if name.is_empty() || !name.bytes().all(is_allowed) {
        return Err(Error::BadAdapterName {
            name: name.to_owned(),
        });
    }
    Ok(())
}

fn name_taken(name: &str, registered: &AdapterKey, offered: &AdapterKey) -> Error {
    Error::AdapterNameTaken {
        name: name.to_owned(),
        registered: registered.0.to_string(),
        offered: offered.0.to_string(),
    }
}

#[cfg(test)]
mod tests;
