//! `HostTier`: packed adapters kept in main memory, so that one that was evicted from the pool returns by a copy.
//!
//! An adapter is found by its content hash alone: what is kept under a hash is what was packed of that content, whatever
//! has become of its files since. The one that was loaded longest ago gives way: who stays in the pool for long needs no
//! copy here. Bytes count until they are unmapped, also those of an adapter that is forgotten while somebody copies it,
//! so the limit holds at every moment. Any thread may call; none copies under the lock.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::MmapMut;

use crate::layout::AdapterLayout;
use crate::pace::{Bursts, Pace};

/// What the system maps at once: an adapter takes whole ones.
const MAPPED_NBYTES: usize = 4096;
/// Bytes copied at a stretch.
const CHUNK_NBYTES: usize = 512 << 10;
/// A copy passes this many bytes in the time in which one is read, hashed and packed.
const COPIED_PER_PACKED: usize = 4;

type Map = fn(usize) -> io::Result<MmapMut>;

/// What the tier holds now, and what it was asked since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostTierStats {
    pub limit_nbytes: usize,
    /// At most the limit.
    pub nbytes: usize,
    pub num_adapters: usize,
    pub num_hits: u64,
    pub num_misses: u64,
    /// Adapters that gave way to others.
    pub num_evictions: u64,
    /// Adapters for which the system had no memory.
    pub num_failures: u64,
}

/// Packed adapters by content hash, at most `limit_nbytes` of them; a tier of 0 bytes keeps and counts nothing.
pub struct HostTier {
    budget: Arc<Budget>,
    map: Map,
    kept: Mutex<Kept>,
    num_hits: AtomicU64,
    num_misses: AtomicU64,
    num_failures: AtomicU64,
}

/// An adapter as it lies in an extent.
pub struct PackedAdapter {
    layout: Arc<AdapterLayout>,
    bytes: MmapMut,
    /// After `bytes`, which are gone when it is given back.
    _share: Share,
}

struct Budget {
    limit: usize,
    /// Changed under the lock of `Kept`, but for what is given back.
    used: AtomicUsize,
}

/// Bytes of the budget, until dropped.
struct Share {
    budget: Arc<Budget>,
    nbytes: usize,
}

#[derive(Default)]
struct Kept {
    by_hash: HashMap<String, Entry>,
    /// Counts uses.
    clock: u64,
    num_evictions: u64,
}

struct Entry {
    packed: Arc<PackedAdapter>,
    last_use: u64,
}

impl PackedAdapter {
    pub fn layout(&self) -> &Arc<AdapterLayout> {
        &self.layout
    }

    /// As many as the layout says.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.layout.nbytes]
    }

    /// Fills all of `extent`, what is beyond the adapter with zeros.
    ///
    /// Panics if the extent is shorter than the layout.
    pub fn copy_to(&self, extent: &mut [u8], pace: &Pace) {
        let (filled, rest) = extent.split_at_mut(self.layout.nbytes);
        copy(self.bytes(), filled, pace);
        rest.fill(0);
    }
}

impl HostTier {
    pub fn new(limit_nbytes: usize) -> Self {
        Self::with_map(limit_nbytes, map)
    }

    fn with_map(limit: usize, map: Map) -> Self {
        let used = AtomicUsize::new(0);
        Self {
            budget: Arc::new(Budget { limit, used }),
            map,
            kept: Mutex::default(),
            num_hits: AtomicU64::new(0),
            num_misses: AtomicU64::new(0),
            num_failures: AtomicU64::new(0),
        }
    }

    /// The adapter of this content; whoever has it keeps its bytes.
    pub fn find(&self, hash: &str) -> Option<Arc<PackedAdapter>> {
        if self.budget.limit == 0 {
            return None;
        }
        let found = self.kept().use_now(hash);
        let count = if found.is_some() {
            &self.num_hits
        } else {
            &self.num_misses
        };
        count.fetch_add(1, Ordering::Relaxed);
        found
    }

    /// Copies a packed adapter out of its extent, if there is room or others can give way.
    ///
    /// Panics if the extent is shorter than the layout.
    pub fn keep(&self, hash: &str, extent: &[u8], layout: &Arc<AdapterLayout>, pace: &Pace) {
        let Some(share) = self.take_share(hash, layout.nbytes) else {
            return;
        };
        let Ok(mut bytes) = (self.map)(share.nbytes) else {
            self.num_failures.fetch_add(1, Ordering::Relaxed);
            return;
        };
        copy(&extent[..layout.nbytes], &mut bytes[..layout.nbytes], pace);
        let packed = PackedAdapter {
            layout: Arc::clone(layout),
            bytes,
            _share: share,
        };
        self.kept().insert(hash, packed);
    }

    /// Forgets all others.
    pub fn retain(&self, is_wanted: impl Fn(&str) -> bool) {
        self.kept().by_hash.retain(|hash, _| is_wanted(hash));
    }

    pub fn stats(&self) -> HostTierStats {
        let kept = self.kept();
        HostTierStats {
            limit_nbytes: self.budget.limit,
            nbytes: self.budget.used.load(Ordering::Acquire),
            num_adapters: kept.by_hash.len(),
            num_hits: self.num_hits.load(Ordering::Relaxed),
            num_misses: self.num_misses.load(Ordering::Relaxed),
            num_evictions: kept.num_evictions,
            num_failures: self.num_failures.load(Ordering::Relaxed),
        }
    }

    /// Room for an adapter that is not there; `None` if all others together could not give enough.
    fn take_share(&self, hash: &str, nbytes: usize) -> Option<Share> {
        let nbytes = nbytes.next_multiple_of(MAPPED_NBYTES);
        let mut kept = self.kept();
        if nbytes > self.budget.limit || kept.by_hash.contains_key(hash) {
            return None;
        }
        while self.budget.used.load(Ordering::Acquire) + nbytes > self.budget.limit {
            kept.evict_oldest()?;
        }
        self.budget.used.fetch_add(nbytes, Ordering::AcqRel);
        Some(Share {
            budget: Arc::clone(&self.budget),
            nbytes,
        })
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn use_now(&mut self, hash: &str) -> Option<Arc<PackedAdapter>> {
        self.clock += 1;
        let entry = self.by_hash.get_mut(hash)?;
        entry.last_use = self.clock;
        Some(Arc::clone(&entry.packed))
    }

    fn insert(&mut self, hash: &str, packed: PackedAdapter) {
        self.clock += 1;
        let entry = Entry {
            packed: Arc::new(packed),
            last_use: self.clock,
        };
        self.by_hash.insert(hash.to_owned(), entry);
    }

    /// `None` if nothing is left but what somebody copies, whose bytes would stay.
    fn evict_oldest(&mut self) -> Option<()> {
        let idle = self.by_hash.iter();
        let idle = idle.filter(|(_, entry)| Arc::strong_count(&entry.packed) == 1);
        let (hash, _) = idle.min_by_key(|(_, entry)| entry.last_use)?;
        let hash = hash.clone();
        self.by_hash.remove(&hash);
        self.num_evictions += 1;
        Some(())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.nbytes, Ordering::AcqRel);
    }
}

/// Memory of its own, which the system has again as soon as it is dropped. Not on huge pages: a virtual machine may find
/// those slower than it copies, where nothing was freed lately, and each byte is touched once.
fn map(nbytes: usize) -> io::Result<MmapMut> {
    MmapMut::map_anon(nbytes)
}

fn copy(from: &[u8], to: &mut [u8], pace: &Pace) {
    let mut bursts = Bursts::new(pace);
    for (from, to) in from.chunks(CHUNK_NBYTES).zip(to.chunks_mut(CHUNK_NBYTES)) {
        to.copy_from_slice(from);
        bursts.advance(from.len() / COPIED_PER_PACKED);
    }
}

#[cfg(test)]
mod tests;
