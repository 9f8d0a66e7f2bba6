//! `SlotTable`: what each adapter slot holds, how many use it, what may be evicted. A step touches residents only.

use crate::ids::{AdapterId, SlotId};

#[derive(Debug)]
pub struct Occupant {
    pub adapter: AdapterId,
    pub is_loaded: bool,
    /// Its load is late, see `scheduler/late_loads.rs`.
    pub is_late: bool,
    /// Running sequences that use it.
    pub num_running: usize,
    pub last_use: u64,
    /// Under one of its names: not to be evicted, but it may be moved.
    pub is_pinned: bool,
    /// The last round in which a waiting request asked for it.
    shielded_in: u64,
}

/// Whether adapters that waiting requests asked for in this round may be evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shield {
    Respect,
    Ignore,
}

#[derive(Debug, Default)]
pub struct SlotTable {
    slots: Vec<Option<Occupant>>,
    round: u64,
    num_resident: usize,
    num_loading: usize,
    num_late: usize,
    /// Counts what gives back memory that no drained queue does: late loads answered, residents unpinned.
    num_returns: u64,
}

impl SlotTable {
    /// A load into the slot begins.
    pub fn occupy(&mut self, slot: SlotId, adapter: AdapterId) {
        if self.slots.len() <= slot.index() {
            self.slots.resize_with(slot.index() + 1, || None);
        }
        let occupant = Occupant {
            adapter,
            is_loaded: false,
            is_late: false,
            num_running: 0,
            last_use: 0,
            is_pinned: false,
            shielded_in: self.round,
        };
        let old = self.slots[slot.index()].replace(occupant);
        assert!(old.is_none(), "invariant: {slot:?} was empty");
        self.num_loading += 1;
    }

    pub fn mark_late(&mut self, slot: SlotId) {
        let was_late = std::mem::replace(&mut self.occupant_mut(slot).is_late, true);
        self.num_late += usize::from(!was_late);
    }

    pub fn mark_loaded(&mut self, slot: SlotId, tick: u64) {
        let occupant = self.occupant_mut(slot);
        occupant.is_loaded = true;
        occupant.last_use = tick;
        let was_late = std::mem::take(&mut occupant.is_late);
        self.num_resident += 1;
        self.end_load(was_late);
    }

    pub fn vacate(&mut self, slot: SlotId) -> Occupant {
        let occupant = self.slots[slot.index()]
            .take()
            .expect("invariant: the slot is occupied");
        assert_eq!(
            occupant.num_running, 0,
            "invariant: an adapter in use stays"
        );
        if occupant.is_loaded {
            self.num_resident -= 1;
        } else {
            self.end_load(occupant.is_late);
        }
        occupant
    }

    pub fn acquire(&mut self, slot: SlotId) {
        self.occupant_mut(slot).num_running += 1;
    }

    pub fn release(&mut self, slot: SlotId, tick: u64) {
        let occupant = self.occupant_mut(slot);
        occupant.num_running -= 1;
        occupant.last_use = tick;
    }

    /// Ends the shields of the round before.
    pub fn begin_round(&mut self) {
        self.round += 1;
    }

    pub fn shield(&mut self, slot: SlotId) {
        self.occupant_mut(slot).shielded_in = self.round;
    }

    pub fn set_pinned(&mut self, slot: SlotId, is_pinned: bool) {
        let was_pinned = std::mem::replace(&mut self.occupant_mut(slot).is_pinned, is_pinned);
        self.num_returns += u64::from(was_pinned && !is_pinned);
    }

    /// Loaded and used by no running sequence: it may be moved.
    pub fn is_idle(&self, slot: SlotId) -> bool {
        self.occupant(slot)
            .is_some_and(|o| o.is_loaded && o.num_running == 0)
    }

    pub fn is_evictable(&self, slot: SlotId, shield: Shield) -> bool {
        let is_free = |o: &Occupant| {
            !o.is_pinned && (shield == Shield::Ignore || o.shielded_in != self.round)
        };
        self.is_idle(slot) && self.occupant(slot).is_some_and(is_free)
    }

    pub fn evictable(&self, shield: Shield) -> impl Iterator<Item = (SlotId, &Occupant)> {
        let slots = self.slots.iter().enumerate();
        let occupied = slots.filter_map(|(slot, o)| Some((SlotId(slot as u32), o.as_ref()?)));
        occupied.filter(move |&(slot, _)| self.is_evictable(slot, shield))
    }

    pub fn occupant(&self, slot: SlotId) -> Option<&Occupant> {
        self.slots.get(slot.index())?.as_ref()
    }

    pub fn num_resident(&self) -> usize {
        self.num_resident
    }

    /// Loads under way that are late.
    pub fn num_late(&self) -> usize {
        self.num_late
    }

    /// Loads under way that are not late.
    pub fn num_in_time(&self) -> usize {
        self.num_loading - self.num_late
    }

    /// What does not fit beside late loads does not until this changes.
    pub fn num_returns(&self) -> u64 {
        self.num_returns
    }

    pub fn check_invariants(&self) {
        let loaded = self.slots.iter().flatten().filter(|o| o.is_loaded).count();
        assert_eq!(loaded, self.num_resident, "residents are counted");
        let loading = self.slots.iter().flatten().filter(|o| !o.is_loaded);
        assert_eq!(
            loading.count(),
            self.num_loading,
            "loads under way are counted"
        );
        let late = self.slots.iter().flatten().filter(|o| o.is_late);
        assert_eq!(
            late.clone().count(),
            self.num_late,
            "late loads are counted"
        );
        assert!(
            late.clone().all(|o| !o.is_loaded),
            "what is loaded is not late"
        );
        let in_use = self.slots.iter().flatten().filter(|o| o.num_running > 0);
        assert!(
            in_use.clone().all(|o| o.is_loaded),
            "only a loaded adapter is in use"
        );
    }

    fn end_load(&mut self, was_late: bool) {
        self.num_loading -= 1;
        self.num_late -= usize::from(was_late);
        self.num_returns += u64::from(was_late);
    }

    fn occupant_mut(&mut self, slot: SlotId) -> &mut Occupant {
        self.slots[slot.index()]
            .as_mut()
            .expect("invariant: the slot is occupied")
    }
}
