//! `Candidates`: the tokens of a row that may stay, and which of them do.

use crate::sampling::weight::place;

/// Candidates that are sorted rather than counted.
const FEW: usize = 32;
/// Buckets of a histogram.
const BUCKETS: usize = 256;

/// Tokens in the order of their ids.
#[derive(Default)]
pub struct Candidates {
    logits: Vec<f32>,
    weights: Vec<u32>,
    ids: Vec<u32>,
    len: usize,
    work: Vec<Placed>,
}

/// A token's place in an order, and what it counts.
#[derive(Clone, Copy)]
struct Placed {
    place: u32,
    mass: u32,
}

/// The last place of which tokens stay, and the mass of what comes before that place.
#[derive(Clone, Copy)]
struct Cut {
    place: u32,
    before: u64,
}

impl Candidates {
    /// Empties it, with room for `capacity`.
    pub fn start(&mut self, capacity: usize) {
        if self.ids.len() < capacity {
            self.logits.resize(capacity, 0.0);
            self.weights.resize(capacity, 0);
            self.ids.resize(capacity, 0);
        }
        self.len = 0;
    }

    /// Adds a token, without a branch.
    #[inline(always)]
    pub fn push_if(&mut self, is_wanted: bool, logit: f32, id: u32) {
        // SAFETY: there is room for as many as are tried, see `start`.
        unsafe {
            *self.logits.get_unchecked_mut(self.len) = logit;
            *self.ids.get_unchecked_mut(self.len) = id;
        }
        self.len += usize::from(is_wanted);
    }

    /// Adds a token and its weight, without a branch.
    #[inline(always)]
    pub fn push_weighed_if(&mut self, is_wanted: bool, logit: f32, weight: u32, id: u32) {
        // SAFETY: as in `push_if`.
        unsafe { *self.weights.get_unchecked_mut(self.len) = weight };
        self.push_if(is_wanted, logit, id);
    }

    /// Ids and weights, in the order of the ids.
    pub fn weighed(&self) -> impl Iterator<Item = (u32, u32)> {
        self.ids[..self.len]
            .iter()
            .copied()
            .zip(self.weights().iter().copied())
    }

    pub fn weights_of_logits(&mut self) -> (&mut [u32], &[f32]) {
        (&mut self.weights[..self.len], &self.logits[..self.len])
    }

    pub fn total(&self) -> u64 {
        self.weights().iter().map(|&weight| u64::from(weight)).sum()
    }

    /// Σ of weight · `value` of the logit.
    pub fn sum_weighted(&self, value: impl Fn(f32) -> i32) -> i64 {
        let weighted =
            |(&logit, &weight): (&f32, &u32)| i64::from(weight) * i64::from(value(logit));
        self.logits().iter().zip(self.weights()).map(weighted).sum()
    }

    /// The token at which the running sum of weights passes `target`, which lies below the total.
    pub fn find(&self, target: u64) -> usize {
        let weights = self.weights().iter().map(|&weight| u64::from(weight));
        let (index, _) = passing(weights, target).expect("the target lies below the total");
        self.ids[index] as usize
    }

    /// Id and logit of the first `count` tokens by logit and id, in this order.
    pub fn top(&mut self, count: usize) -> impl Iterator<Item = (u32, f32)> {
        self.keep_top(count);
        self.work.clear();
        let logits = self.logits[..self.len].iter();
        let ids = (0..).zip(logits);
        self.work.extend(ids.map(|(mass, &logit)| Placed {
            place: place(logit),
            mass,
        }));
        self.work
            .sort_unstable_by_key(|placed| (placed.place, placed.mass));
        let indices = self.work.iter().map(|placed| placed.mass as usize);
        indices.map(|index| (self.ids[index], self.logits[index]))
    }

    /// Keeps tokens of at least this weight.
    pub fn keep_heavy(&mut self, lowest: f64) {
        if lowest == 0.0 {
            return;
        }
        self.retain(|_, weight| f64::from(weight) >= lowest);
    }

    /// Keeps the `count` largest logits, of equals those of the lowest ids.
    pub fn keep_top(&mut self, count: usize) {
        if count < self.len {
            self.keep_first(count as u64, |logit, _| (place(logit), 1));
        }
    }

    /// Keeps the largest logits, before each of which the sum of weights is below `limit`.
    pub fn keep_mass(&mut self, limit: u64) {
        self.keep_first(limit, |logit, weight| (place(logit), weight));
    }

    /// Keeps the first by place and id, before each of which there is less than `limit` mass; `placed`
    /// gives place and mass of a logit and its weight.
    pub fn keep_first(&mut self, limit: u64, placed: impl Fn(f32, u32) -> (u32, u32)) {
        let Some(cut) = self.cut(limit, &placed) else {
            return;
        };
        let mut before = cut.before;
        self.retain(|logit, weight| {
            let (place, mass) = placed(logit, weight);
            let is_at_cut = place == cut.place;
            let stays = place < cut.place || (is_at_cut && before < limit);
            before += u64::from(mass) * u64::from(is_at_cut);
            stays
        });
    }

    /// Where the mass reaches `limit`, by radix selection; `None` where it never does.
    fn cut(&mut self, limit: u64, placed: &impl Fn(f32, u32) -> (u32, u32)) -> Option<Cut> {
        let work = &mut self.work;
        work.clear();
        let tokens = self.logits[..self.len]
            .iter()
            .zip(&self.weights[..self.len]);
        work.extend(tokens.map(|(&logit, &weight)| {
            let (place, mass) = placed(logit, weight);
            Placed { place, mass }
        }));
        let mut before = 0;
        while work.len() > FEW {
            let places = work.iter().map(|token| token.place);
            let (low, high) = places.fold((u32::MAX, 0), |(low, high), place| {
                (low.min(place), high.max(place))
            });
            let num_bits = 32 - (high - low).leading_zeros();
            let shift = num_bits.saturating_sub(BUCKETS.ilog2());
            let bucket_of = |token: &Placed| ((token.place - low) >> shift) as usize;
            let mut masses = [0; BUCKETS];
            for token in &*work {
                masses[bucket_of(token)] += u64::from(token.mass);
            }
            let needed = limit - before;
            let (bucket, left) = passing(masses.into_iter(), needed - 1)?;
            before = limit - left - 1;
            if low == high {
                return Some(Cut { place: low, before });
            }
            work.retain(|token| bucket_of(token) == bucket);
        }
        cut_of_few(work, before, limit)
    }

    fn logits(&self) -> &[f32] {
        &self.logits[..self.len]
    }

    fn weights(&self) -> &[u32] {
        &self.weights[..self.len]
    }

    fn retain(&mut self, mut stays: impl FnMut(f32, u32) -> bool) {
        let mut kept = 0;
        for index in 0..self.len {
            let (logit, weight) = (self.logits[index], self.weights[index]);
            self.logits[kept] = logit;
            self.weights[kept] = weight;
            self.ids[kept] = self.ids[index];
            kept += usize::from(stays(logit, weight));
        }
        self.len = kept;
    }
}

fn cut_of_few(tokens: &mut [Placed], mut before: u64, limit: u64) -> Option<Cut> {
    tokens.sort_unstable_by_key(|token| token.place);
    for equals in tokens.chunk_by(|a, b| a.place == b.place) {
        let mass: u64 = equals.iter().map(|token| u64::from(token.mass)).sum();
        if before + mass >= limit {
            let place = equals[0].place;
            return Some(Cut { place, before });
        }
        before += mass;
    }
    None
}

/// The index at which the running sum of `masses` passes `target`, and what of it the mass there has to
/// pass; `None` where it never does.
pub fn passing(masses: impl Iterator<Item = u64>, target: u64) -> Option<(usize, u64)> {
    let mut left = target;
    for (index, mass) in masses.enumerate() {
        if left < mass {
            return Some((index, left));
        }
        left -= mass;
    }
    None
}
