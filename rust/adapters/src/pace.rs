//! Pace: adapters are read in short bursts while the model computes on the same cores.
//!
//! A thread that reads for ten milliseconds takes a core from the kernels, and every op of a step then
//! waits for the share of it that this core had. A low thread priority would starve the load instead:
//! the kernels leave hardly any time idle. Short bursts with rests between cost each step little, and
//! the load is done in bounded time.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

/// Bytes read at a stretch, a quarter of a millisecond of work.
const BURST_NBYTES: usize = 512 << 10;

/// How long reading rests after each burst; shared by all loads, and may change during them.
#[derive(Debug, Default)]
pub struct Pace {
    rest_us: AtomicU64,
}

impl Pace {
    /// Zero, the default, is full speed.
    pub fn set_rest(&self, rest: Duration) {
        let rest_us = u64::try_from(rest.as_micros()).unwrap_or(u64::MAX);
        self.rest_us.store(rest_us, Ordering::Relaxed);
    }

    fn rest(&self) -> Duration {
        Duration::from_micros(self.rest_us.load(Ordering::Relaxed))
    }
}

/// One load's way through its bursts.
pub(crate) struct Bursts<'a> {
    pace: &'a Pace,
    nbytes: usize,
}

impl<'a> Bursts<'a> {
    pub(crate) fn new(pace: &'a Pace) -> Self {
        Self { pace, nbytes: 0 }
    }

    /// Call after each piece of work; rests where a burst ends.
    pub(crate) fn advance(&mut self, nbytes: usize) {
        let rest = self.rest_after(nbytes);
        if !rest.is_zero() {
            thread::sleep(rest);
        }
    }

    fn rest_after(&mut self, nbytes: usize) -> Duration {
        self.nbytes += nbytes;
        if self.nbytes < BURST_NBYTES {
            return Duration::ZERO;
        }
        self.nbytes = 0;
        self.pace.rest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: usize = BURST_NBYTES / 4;

    fn rests_ms(bursts: &mut Bursts<'_>, num_pieces: usize) -> Vec<u128> {
        let mut rest = |_| bursts.rest_after(PIECE).as_millis();
        (0..num_pieces).map(&mut rest).collect()
    }

    #[test]
    fn a_load_rests_after_every_burst() {
        let pace = Pace::default();
        pace.set_rest(Duration::from_millis(8));
        let expected = [0, 0, 0, 8].repeat(3);
        assert_eq!(rests_ms(&mut Bursts::new(&pace), 12), expected);
    }

    #[test]
    fn a_load_never_rests_at_full_speed() {
        let pace = Pace::default();
        assert_eq!(rests_ms(&mut Bursts::new(&pace), 12), [0; 12]);
    }

    #[test]
    fn a_load_under_way_takes_up_a_new_pace() {
        let pace = Pace::default();
        let mut bursts = Bursts::new(&pace);
        for ms in [8, 0, 4] {
            pace.set_rest(Duration::from_millis(ms));
            assert_eq!(rests_ms(&mut bursts, 4), [0, 0, 0, u128::from(ms)]);
        }
    }
}
