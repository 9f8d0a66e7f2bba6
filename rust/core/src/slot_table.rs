//! `SlotTable`: what each adapter slot holds, how many use it, what may be evicted. A step touches residents only.

use crate::ids::{AdapterId, SlotId};

#[derive(Debug)]
pub struct Occupant {
    pub adapter: AdapterId,
    pub is_loaded: bool,
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
            num_running: 0,
            last_use: 0,
            is_pinned: false,
            shielded_in: self.round,
        };
        let old = self.slots[slot.index()].replace(occupant);
        assert!(old.is_none(), "invariant: {slot:?} was empty");
    }

    pub fn mark_loaded(&mut self, slot: SlotId, tick: u64) {
        self.num_resident += 1;
        let occupant = self.occupant_mut(slot);
        occupant.is_loaded = true;
        occupant.last_use = tick;
    }

    pub fn vacate(&mut self, slot: SlotId) -> Occupant {
        let occupant = self.slots[slot.index()]
            .take()
            .expect("invariant: the slot is occupied");
        assert_eq!(
            occupant.num_running, 0,
            "invariant: an adapter in use stays"
        );
        self.num_resident -= usize::from(occupant.is_loaded);
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
        self.occupant_mut(slot).is_pinned = is_pinned;
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

    pub fn check_invariants(&self) {
        let loaded = self.slots.iter().flatten().filter(|o| o.is_loaded).count();
        assert_eq!(loaded, self.num_resident, "residents are counted");
        let in_use = self.slots.iter().flatten().filter(|o| o.num_running > 0);
        assert!(
            in_use.clone().all(|o| o.is_loaded),
            "only a loaded adapter is in use"
        );
    }

    fn occupant_mut(&mut self, slot: SlotId) -> &mut Occupant {
        self.slots[slot.index()]
            .as_mut()
            .expect("invariant: the slot is occupied")
    }
}
