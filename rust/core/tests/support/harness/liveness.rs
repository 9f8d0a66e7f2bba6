//! What must end though loads are stuck, and in how many steps.

use std::collections::BTreeSet;

use super::{Expected, Harness};

/// Requests that arrive while others are waited for.
const MAX_ARRIVALS: usize = 8;

impl Harness {
    /// Steps, with stuck loads unanswered and more requests arriving, until everything has ended that fits beside what
    /// the stuck loads hold. That must take a bounded number of steps.
    pub(super) fn settle(&mut self) {
        self.count("settled", 1);
        let mut owed: BTreeSet<u64> = self.expected.keys().copied().collect();
        let limit = owed.len() + MAX_ARRIVALS;
        for _ in 0..self.bound() {
            for adapter in self.device.loading() {
                if self.is_stuck(adapter) {
                    self.scheduler
                        .adapter_load_late(loraserve_core::AdapterId(adapter))
                        .unwrap();
                    self.late.insert(adapter);
                } else {
                    self.end_load(adapter, true);
                    self.check();
                }
            }
            if self.expected.len() < limit && self.rng.one_in(4) {
                self.submit();
                self.check();
            }
            self.commit();
            self.check();
            let num_owed = owed.len();
            owed.retain(|request| self.expected.contains_key(request));
            if !self.device.loading().is_empty() {
                self.count("ended beside stuck loads", (num_owed - owed.len()) as u64);
            }
            owed.retain(|request| self.fits_beside_stuck(&self.expected[request]));
            if owed.is_empty() {
                return;
            }
            self.schedule();
            if self.runs_ahead {
                self.schedule_ahead();
            }
            self.check();
        }
        panic!(
            "requests {owed:?} fit beside the stuck loads and end in {} steps: {:?}",
            self.bound(),
            self.scheduler.stats()
        );
    }

    /// Answers every load and steps until nothing is left, which must take a bounded number of steps.
    pub fn drain(&mut self) {
        self.stuck.clear();
        let unfinished = self.expected.len();
        for _ in 0..self.bound() {
            if self.expected.is_empty()
                && self.in_flight.is_empty()
                && self.device.loading().is_empty()
                && self.scheduler.num_prefetches() == 0
            {
                return;
            }
            self.schedule();
            if self.runs_ahead {
                self.schedule_ahead();
            }
            self.commit();
            for adapter in self.device.loading() {
                self.end_load(adapter, true);
                self.check();
            }
            self.check();
        }
        panic!(
            "{unfinished} requests end in {} steps: {:?}",
            self.bound(),
            self.scheduler.stats()
        );
    }

    pub(super) fn is_stuck(&self, adapter: u32) -> bool {
        self.stuck.contains(&self.hash_of[&adapter])
    }

    /// Steps that suffice for everything unfinished.
    fn bound(&self) -> usize {
        200 + (self.expected.len() + MAX_ARRIVALS) * self.config.max_model_len * 10
    }

    /// Whether the request could run to its end in a pool with nothing else but what is pinned and what stuck loads hold.
    ///
    /// Its adapters need pages in a row; that between two stuck extents there is room for them and for all that is
    /// pinned is enough, if more than needed.
    fn fits_beside_stuck(&self, request: &Expected) -> bool {
        if request.hashes.iter().any(|hash| self.stuck.contains(hash)) {
            return false;
        }
        let loading = self.device.loading();
        let stuck: Vec<u32> = loading.into_iter().filter(|&a| self.is_stuck(a)).collect();
        let listed = self.scheduler.adapters();
        let pinned: BTreeSet<_> = listed
            .iter()
            .filter(|info| info.is_pinned && !stuck.contains(&info.id.0))
            .filter(|info| !request.hashes.contains(&info.content_hash.0.to_string()))
            .map(|info| (info.id, self.pages_of(info.nbytes)))
            .collect();
        let pinned_pages: usize = pinned.iter().map(|&(_, num_pages)| num_pages).sum();
        let num_adapters = request.hashes.len();
        if num_adapters + pinned.len() + stuck.len() > self.config.max_num_slots {
            return false;
        }
        let extents = stuck.iter().map(|&adapter| self.device.extent(adapter));
        let mut taken: Vec<_> = extents.collect();
        taken.sort_unstable_by_key(|pages| pages.start);
        let num_taken: usize = taken.iter().map(std::ops::Range::len).sum();
        let num_free = self.config.num_pages - num_taken;
        if request.kv_pages + request.adapter_pages + pinned_pages > num_free {
            return false;
        }
        let starts = [0].into_iter().chain(taken.iter().map(|pages| pages.end));
        let ends = taken.iter().map(|pages| pages.start);
        let gaps = starts.zip(ends.chain([self.config.num_pages]));
        let largest = gaps.map(|(start, end)| end - start).max().unwrap_or(0);
        num_adapters == 0 || request.adapter_pages + pinned_pages <= largest
    }
}
