//! `Router`: which replica gets a request, by what a router in front of replicas can know.
//!
//! It knows what it has sent, and of which requests it has seen the end. An adapter's *order* is all replicas by
//! rendezvous hashing (Thaler and Ravishankar, 1998): the first is its home; when replicas come and go, only what was
//! theirs moves. A replica is *full* where it has more than `spill.factor` times the mean of open requests and
//! `spill.slack` more.

use std::collections::HashMap;

use crate::error::Error;
use crate::workload::Arrival;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// One after the other.
    RoundRobin,
    /// The one with the fewest open requests.
    LeastLoaded,
    /// Of two drawn at random, the one with fewer open requests (Ray Serve's own).
    PowerOfTwo,
    /// The adapter's home, whatever its load.
    Home,
    /// The first in the adapter's order that is not full: a hot adapter spreads as far as it must.
    HomeAndSpill,
    /// Of those that were sent the adapter lately, the least loaded; where all are full, the least loaded of all.
    Resident,
    /// As home and spill, but of the first replicas, as many as the adapter's load needs, the one that the prefix names.
    Prefix,
    /// What the router on Ray Serve does (python/loraserve/ray/placement.py): of the first replicas in the adapter's order,
    /// as many as its part of the load lately fills, the one that the prefix names or the least loaded; where that has
    /// much more than the average, the first that was sent the adapter lately, or else the least loaded.
    Homes,
}

impl Policy {
    pub const ALL: [(&'static str, Self); 8] = [
        ("round-robin", Self::RoundRobin),
        ("least-loaded", Self::LeastLoaded),
        ("power-of-two", Self::PowerOfTwo),
        ("home", Self::Home),
        ("home-and-spill", Self::HomeAndSpill),
        ("resident", Self::Resident),
        ("prefix", Self::Prefix),
        ("homes", Self::Homes),
    ];

    pub fn named(name: &str) -> Option<Self> {
        let mut all = Self::ALL.iter();
        all.find(|(own, _)| *own == name).map(|&(_, policy)| policy)
    }

    /// Whether it never looks at what has ended.
    pub fn is_blind(self) -> bool {
        matches!(self, Self::RoundRobin | Self::Home)
    }
}

/// When a replica is full.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spill {
    pub factor: f64,
    pub slack: f64,
    /// After this long without a request a replica counts as having given up an adapter.
    pub resident_s: f64,
}

impl Default for Spill {
    fn default() -> Self {
        Self {
            factor: 1.25,
            slack: 4.0,
            resident_s: 60.0,
        }
    }
}

impl Spill {
    pub fn validate(&self) -> Result<(), Error> {
        for (name, value, least, expected) in [
            ("spill_factor", self.factor, 1.0, "1 or more"),
            ("spill_slack", self.slack, 0.0, "0 or more"),
            ("resident_s", self.resident_s, 0.0, "0 or more"),
        ] {
            if !(value.is_finite() && value >= least) {
                return Err(Error::BadValue {
                    name,
                    value,
                    expected,
                });
            }
        }
        Ok(())
    }
}

/// Of `Policy::Homes`, as in `placement.py`.
mod homes {
    pub const HALF_LIFE_S: f64 = 30.0;
    /// Of a replica's part of the load, which one home of an adapter is to carry.
    pub const PART: f64 = 0.75;
    pub const MAX_LOAD_RATIO: f64 = 1.5;
    pub const MIN_SLACK: f64 = 8.0;
    /// Requests by which a replica that has the prefix may exceed the least loaded home.
    pub const PREFIX_SPREAD: u64 = 2;
}

/// Requests, worth half after `HALF_LIFE_S`.
#[derive(Debug, Clone, Copy, Default)]
struct Lately {
    count: f64,
    at_s: f64,
}

impl Lately {
    fn worth(self, now_s: f64) -> f64 {
        self.count * 0.5_f64.powf((now_s - self.at_s) / homes::HALF_LIFE_S)
    }

    fn add_one(&mut self, now_s: f64) {
        self.count = self.worth(now_s) + 1.0;
        self.at_s = now_s;
    }
}

/// A replica that was sent requests of an adapter.
#[derive(Debug, Clone, Copy)]
struct Holder {
    replica: usize,
    last_s: f64,
}

pub struct Router {
    policy: Policy,
    spill: Spill,
    /// Hash of each replica's name.
    replicas: Vec<u64>,
    /// Requests sent to each that it has not told the end of.
    open: Vec<u64>,
    num_open: u64,
    holders: HashMap<u32, Vec<Holder>>,
    open_of_adapter: HashMap<u32, u64>,
    lately: HashMap<u32, Lately>,
    all_lately: Lately,
    num_routed: u64,
}

impl Router {
    pub fn new(policy: Policy, spill: Spill, num_replicas: usize) -> Self {
        Self {
            policy,
            spill,
            replicas: (0..num_replicas as u64)
                .map(|number| mix(!number))
                .collect(),
            open: vec![0; num_replicas],
            num_open: 0,
            holders: HashMap::new(),
            open_of_adapter: HashMap::new(),
            lately: HashMap::new(),
            all_lately: Lately::default(),
            num_routed: 0,
        }
    }

    pub fn route(&mut self, arrival: &Arrival) -> usize {
        let replica = self.choose(arrival);
        self.num_routed += 1;
        self.open[replica] += 1;
        self.num_open += 1;
        if let (Policy::Prefix, Some(adapter)) = (self.policy, arrival.adapter) {
            *self.open_of_adapter.entry(adapter).or_default() += 1;
        }
        replica
    }

    /// A request that was sent to `replica` has ended.
    pub fn end(&mut self, replica: usize, adapter: Option<u32>) {
        self.open[replica] -= 1;
        self.num_open -= 1;
        let Some(adapter) = adapter else { return };
        if let Some(open) = self.open_of_adapter.get_mut(&adapter) {
            *open -= 1;
            if *open == 0 {
                self.open_of_adapter.remove(&adapter);
            }
        }
    }

    fn choose(&mut self, arrival: &Arrival) -> usize {
        let Some(adapter) = arrival.adapter else {
            return self.choose_for_base(arrival);
        };
        match self.policy {
            Policy::RoundRobin => self.in_turn(),
            Policy::LeastLoaded => self.least_loaded(),
            Policy::PowerOfTwo => self.of_two(),
            Policy::Home => self.first_in_order(mix(u64::from(adapter)), |_| true),
            Policy::HomeAndSpill => self.not_full_in_order(mix(u64::from(adapter))),
            Policy::Resident => self.resident(adapter, arrival.at_s),
            Policy::Prefix => self.by_prefix(adapter, arrival),
            Policy::Homes => self.at_homes(adapter, arrival),
        }
    }

    /// The base model is everywhere; only its prefixes have homes.
    fn choose_for_base(&self, arrival: &Arrival) -> usize {
        match self.policy {
            Policy::RoundRobin => self.in_turn(),
            Policy::PowerOfTwo => self.of_two(),
            Policy::Prefix | Policy::Homes if arrival.prefix_tokens > 0 => {
                self.not_full_in_order(mix(!u64::from(arrival.prefix)))
            }
            _ => self.least_loaded(),
        }
    }

    fn in_turn(&self) -> usize {
        (self.num_routed % self.replicas.len() as u64) as usize
    }

    /// Of equally loaded ones, the first in an order that changes with each request.
    fn least_loaded(&self) -> usize {
        let num_replicas = self.replicas.len();
        let first = mix(self.num_routed) as usize % num_replicas;
        let turned = (0..num_replicas).map(|i| (first + i) % num_replicas);
        let least = turned.min_by_key(|&replica| self.open[replica]);
        least.expect("invariant: there are replicas")
    }

    fn of_two(&self) -> usize {
        let num_replicas = self.replicas.len() as u64;
        let draw = |salt: u64| (mix(self.num_routed ^ salt) % num_replicas) as usize;
        let (a, b) = (draw(1 << 62), draw(1 << 63));
        if self.open[b] < self.open[a] { b } else { a }
    }

    fn full_from(&self) -> f64 {
        let mean = self.num_open as f64 / self.replicas.len() as f64;
        self.spill.factor * mean + self.spill.slack
    }

    /// The first of those that `may`, in the order that `key` gives.
    fn first_in_order(&self, key: u64, may: impl Fn(usize) -> bool) -> usize {
        let allowed = (0..self.replicas.len()).filter(|&replica| may(replica));
        let first = allowed.max_by_key(|&replica| mix(key ^ self.replicas[replica]));
        first.unwrap_or_else(|| self.least_loaded())
    }

    fn not_full_in_order(&self, key: u64) -> usize {
        let full = self.full_from();
        self.first_in_order(key, |replica| (self.open[replica] as f64) < full)
    }

    fn resident(&mut self, adapter: u32, now_s: f64) -> usize {
        let (full, resident_s) = (self.full_from(), self.spill.resident_s);
        let anyone = self.least_loaded();
        let holders = self.holders.entry(adapter).or_default();
        holders.retain(|holder| now_s - holder.last_s <= resident_s);
        let open = &self.open;
        let least = holders.iter_mut().min_by_key(|holder| open[holder.replica]);
        match least {
            Some(holder) if (open[holder.replica] as f64) < full => {
                holder.last_s = now_s;
                holder.replica
            }
            _ => {
                self.hold(adapter, anyone, now_s);
                anyone
            }
        }
    }

    fn at_homes(&mut self, adapter: u32, arrival: &Arrival) -> usize {
        let (now_s, num_replicas) = (arrival.at_s, self.replicas.len());
        let lately = self.lately.entry(adapter).or_default();
        lately.add_one(now_s);
        self.all_lately.add_one(now_s);
        let all = self.all_lately.count;
        let part = lately.count / all * num_replicas as f64 / homes::PART;
        let is_known = all >= 4.0 * num_replicas as f64; // of the first requests each is a large part
        let num_homes = if is_known { part.ceil() as usize } else { 1 };
        let key = mix(u64::from(adapter));
        let first = self.first_of_order(key, num_homes.clamp(1, num_replicas));
        let home = self.home_of_prefix(&first, key, arrival);
        let average = (self.num_open + 1) as f64 / num_replicas as f64;
        let limit = (homes::MAX_LOAD_RATIO * average).max(average + homes::MIN_SLACK);
        let fits = |replica: usize| (self.open[replica] + 1) as f64 <= limit;
        let chosen = if fits(home) {
            home
        } else {
            let resident_s = self.spill.resident_s;
            let holders = self.holders.get(&adapter).map_or(&[][..], Vec::as_slice);
            let recent = holders
                .iter()
                .filter(|holder| now_s - holder.last_s <= resident_s);
            let having = recent
                .map(|holder| holder.replica)
                .filter(|&replica| fits(replica));
            let first = having.max_by_key(|&replica| mix(key ^ self.replicas[replica]));
            first.unwrap_or_else(|| self.least_loaded())
        };
        self.hold(adapter, chosen, now_s);
        chosen
    }

    /// The home that the prefix names, unless another has clearly less to do.
    fn home_of_prefix(&self, homes: &[usize], key: u64, arrival: &Arrival) -> usize {
        let least = homes.iter().min_by_key(|&&home| self.open[home]);
        let least = *least.expect("invariant: an adapter has homes");
        if arrival.prefix_tokens == 0 {
            return least;
        }
        let by_prefix = key ^ mix(!u64::from(arrival.prefix));
        let wanted = homes
            .iter()
            .max_by_key(|&&home| mix(by_prefix ^ self.replicas[home]));
        let wanted = *wanted.expect("invariant: an adapter has homes");
        if self.open[wanted] <= self.open[least] + homes::PREFIX_SPREAD {
            wanted
        } else {
            least
        }
    }

    fn hold(&mut self, adapter: u32, replica: usize, now_s: f64) {
        let holders = self.holders.entry(adapter).or_default();
        holders.retain(|holder| holder.replica != replica);
        holders.push(Holder {
            replica,
            last_s: now_s,
        });
    }

    /// The first `count` replicas in the order that `key` gives, in any order.
    fn first_of_order(&self, key: u64, count: usize) -> Vec<usize> {
        if count == 1 {
            return vec![self.first_in_order(key, |_| true)];
        }
        let mut order: Vec<_> = (0..self.replicas.len()).collect();
        let score = |replica: &usize| std::cmp::Reverse(mix(key ^ self.replicas[*replica]));
        if count < order.len() {
            order.select_nth_unstable_by_key(count, score);
            order.truncate(count);
        }
        order
    }

    fn by_prefix(&self, adapter: u32, arrival: &Arrival) -> usize {
        let (full, key) = (self.full_from(), mix(u64::from(adapter)));
        let open = self.open_of_adapter.get(&adapter).map_or(0, |&open| open);
        let num_needed = 1 + (open as f64 / full) as usize;
        if num_needed == 1 || arrival.prefix_tokens == 0 {
            return self.not_full_in_order(key);
        }
        let order = self.first_of_order(key, num_needed.min(self.replicas.len()));
        let by_prefix = key ^ mix(!u64::from(arrival.prefix));
        let first = order
            .iter()
            .filter(|&&replica| (self.open[replica] as f64) < full)
            .max_by_key(|&&replica| mix(by_prefix ^ self.replicas[replica]));
        first.map_or_else(|| self.not_full_in_order(key), |&replica| replica)
    }
}

/// splitmix64's output function.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(adapter: u32) -> Arrival {
        Arrival {
            at_s: 0.0,
            adapter: Some(adapter),
            prompt_tokens: 8,
            answer_tokens: 8,
            prefix: 0,
            prefix_tokens: 0,
        }
    }

    fn router(policy: Policy, num_replicas: usize) -> Router {
        Router::new(policy, Spill::default(), num_replicas)
    }

    #[test]
    fn names_are_policies() {
        for (name, policy) in Policy::ALL {
            assert_eq!(Policy::named(name), Some(policy));
        }
        assert_eq!(Policy::named("random"), None);
    }

    #[test]
    fn a_home_stays_when_another_replica_comes() {
        let (mut few, mut more) = (router(Policy::Home, 9), router(Policy::Home, 10));
        let moved = (0..1000).filter(|&adapter| {
            let (before, after) = (few.route(&of(adapter)), more.route(&of(adapter)));
            assert!(before == after || after == 9);
            before != after
        });
        let num_moved = moved.count();
        assert!((50..200).contains(&num_moved), "{num_moved} of 1000 moved");
    }

    #[test]
    fn a_hot_adapter_spreads_and_a_cold_one_stays() {
        let mut router = router(Policy::HomeAndSpill, 10);
        let hot: std::collections::HashSet<_> = (0..400).map(|_| router.route(&of(1))).collect();
        assert_eq!(hot.len(), 8); // 400 / (1.25 · 40)
        let most = *router.open.iter().max().unwrap() as f64;
        assert!(most <= 1.25 * 40.0 + 5.0);
        let home = router.route(&of(2));
        router.end(home, Some(2));
        assert_eq!(router.route(&of(2)), home);
    }

    #[test]
    fn least_loaded_is_even() {
        let mut router = router(Policy::LeastLoaded, 7);
        for _ in 0..70 {
            router.route(&of(0));
        }
        assert_eq!(router.open, [10; 7]);
        router.end(3, Some(0));
        assert_eq!(router.route(&of(5)), 3);
    }

    #[test]
    fn a_resident_adapter_returns_to_where_it_was_until_it_is_forgotten() {
        let mut router = router(Policy::Resident, 50);
        let first = router.route(&of(1));
        for other in 2..40 {
            router.route(&of(other));
        }
        assert_eq!(router.route(&of(1)), first);
        let later = Arrival {
            at_s: 1000.0,
            ..of(1)
        };
        assert_ne!(router.route(&later), first);
    }

    #[test]
    fn prefixes_share_out_the_replicas_of_a_hot_adapter() {
        let mut router = router(Policy::Prefix, 10);
        router.open = vec![20; 10];
        router.num_open = 200;
        router.open_of_adapter.insert(1, 100);
        let with_prefix = |prefix| Arrival {
            prefix,
            prefix_tokens: 4,
            ..of(1)
        };
        let one = router.route(&with_prefix(7));
        assert_eq!(router.route(&with_prefix(7)), one);
        let all: std::collections::HashSet<_> = (0..20)
            .map(|prefix| router.route(&with_prefix(prefix)))
            .collect();
        assert_eq!(all.len(), 4); // 100 / (1.25 · 20 + 4), and one
    }

    #[test]
    fn homes_are_as_many_as_an_adapters_part_of_the_load_fills() {
        let mut router = router(Policy::Homes, 10);
        let mut used = vec![std::collections::HashSet::new(); 3];
        for index in 0..600_u32 {
            // A third of all requests are of adapter 0; the others are of adapters that come once in a while.
            let adapter = if index % 3 == 0 { 0 } else { 1 + index % 97 };
            let arrival = Arrival {
                at_s: f64::from(index) / 100.0,
                ..of(adapter)
            };
            let replica = router.route(&arrival);
            if index > 200 && adapter < 3 {
                used[adapter as usize].insert(replica);
            }
            router.end(replica, Some(adapter));
        }
        assert!((1..=5).contains(&used[0].len()), "{used:?}"); // 10 / 3 / 0.75 homes, the least loaded of them
        assert_eq!((used[1].len(), used[2].len()), (1, 1));
    }

    #[test]
    fn a_home_with_much_more_than_the_average_passes_requests_on() {
        let mut router = router(Policy::Homes, 10);
        let home = router.route(&of(5));
        let others: std::collections::HashSet<_> = (0..12).map(|_| router.route(&of(5))).collect();
        assert!(others.contains(&home));
        assert!(others.len() > 1);
        assert!(router.open[home] <= 10);
    }

    #[test]
    fn a_spill_that_makes_every_replica_full_is_refused() {
        let spill = Spill {
            factor: 0.5,
            ..Spill::default()
        };
        let message = spill.validate().unwrap_err().to_string();
        assert_eq!(message, "spill_factor is 0.5, it must be 1 or more");
    }
}
