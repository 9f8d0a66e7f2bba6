//! Names bound to adapters: registered, replaced, unregistered, resolved and pinned.

use super::{AdapterCache, AdapterContent, AdapterState, Entry, Name, Pinned};
use crate::error::Error;
use crate::ids::{AdapterId, AdapterKey, SlotId};

impl AdapterCache {
    /// Binds a name; the same name and content again is the same adapter.
    pub fn register(
        &mut self,
        name: &str,
        content: AdapterContent,
        num_pages: usize,
    ) -> Result<AdapterId, Error> {
        check_name(name)?;
        if let Some(bound) = self.names.get(name) {
            let (adapter, registered) = (bound.adapter, &self.entry(bound.adapter).content.key);
            if !bound.is_unloading && *registered == content.key {
                return Ok(adapter);
            }
            if !bound.is_unloading {
                return Err(name_taken(name, registered, &content.key));
            }
            self.entry_mut(adapter)
                .unloading
                .retain(|other| other != name);
        }
        let adapter = self.find_or_insert(content, num_pages);
        self.bind(name, adapter, false);
        Ok(adapter)
    }

    /// Binds a name whatever it was bound to, and keeps its pin; accepted requests keep the old adapter.
    ///
    /// Returns the slot to free if that leaves the old adapter unused.
    pub fn replace(
        &mut self,
        name: &str,
        content: AdapterContent,
        num_pages: usize,
    ) -> Result<(AdapterId, Option<SlotId>), Error> {
        let Some((old, is_pinned)) = self.bound(name) else {
            return Ok((self.register(name, content, num_pages)?, None));
        };
        if self.entry(old).content.key == content.key {
            return Ok((old, None));
        }
        let adapter = self.find_or_insert(content, num_pages);
        self.entry_mut(old).names.retain(|other| other != name);
        self.bind(name, adapter, is_pinned);
        if is_pinned {
            self.change_pins(old, false);
            self.change_pins(adapter, true);
        }
        Ok((adapter, self.forget_if_unused(old)))
    }

    /// What a name that takes requests stands for, and whether it is pinned under it.
    pub fn bound(&self, name: &str) -> Option<(AdapterId, bool)> {
        let bound = self.names.get(name).filter(|bound| !bound.is_unloading)?;
        Some((bound.adapter, bound.is_pinned))
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
        if std::mem::take(&mut bound.is_pinned) {
            self.change_pins(adapter, false);
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

    /// Pins the adapter under this name, or no longer.
    pub fn set_pinned(&mut self, name: &str, is_pinned: bool) -> Result<(), Error> {
        let adapter = self.resolve(name)?;
        let bound = self.names.get_mut(name);
        let bound = bound.expect("invariant: a resolved name is bound");
        if std::mem::replace(&mut bound.is_pinned, is_pinned) != is_pinned {
            self.change_pins(adapter, is_pinned);
        }
        Ok(())
    }

    pub fn pinned(&self) -> Pinned {
        self.pinned
    }

    fn bind(&mut self, name: &str, adapter: AdapterId, is_pinned: bool) {
        self.entry_mut(adapter).names.push(name.to_owned());
        self.names.insert(
            name.to_owned(),
            Name {
                adapter,
                is_unloading: false,
                is_pinned,
            },
        );
    }

    fn find_or_insert(&mut self, content: AdapterContent, num_pages: usize) -> AdapterId {
        if let Some(adapter) = self.find(&content.key) {
            return adapter;
        }
        let adapter = AdapterId(self.next_id);
        self.next_id += 1;
        self.by_key.insert(content.key.clone(), adapter);
        let entry = Entry {
            content,
            num_pages,
            state: AdapterState::Registered,
            users: 0,
            num_pins: 0,
            num_loads: 0,
            num_load_failures: 0,
            num_evictions: 0,
            num_uninvoked: 0,
            names: Vec::new(),
            unloading: Vec::new(),
        };
        self.entries.insert(adapter, entry);
        self.num_pages += num_pages;
        adapter
    }

    fn change_pins(&mut self, adapter: AdapterId, is_pinned: bool) {
        let entry = self.entry_mut(adapter);
        let was_pinned = entry.is_pinned();
        entry.num_pins = if is_pinned {
            entry.num_pins + 1
        } else {
            entry.num_pins - 1
        };
        let (is_pinned, num_pages, state) = (entry.is_pinned(), entry.num_pages, entry.state);
        if was_pinned == is_pinned {
            return;
        }
        if is_pinned {
            self.pinned.num_adapters += 1;
            self.pinned.num_pages += num_pages;
        } else {
            self.pinned.num_adapters -= 1;
            self.pinned.num_pages -= num_pages;
        }
        if let AdapterState::Resident(slot) | AdapterState::Loading(slot) = state {
            self.slots.set_pinned(slot, is_pinned);
        }
    }
}

/// `@` is for generations of an adapter (NAME@NUMBER), which are no names that a caller may give.
fn check_name(name: &str) -> Result<(), Error> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.:@".contains(&byte);
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
