//! `Histogram`: many durations in little memory, each within one percent.

const LEAST_S: f64 = 1e-6;
const GROWTH: f64 = 1.02;
const NUM_BUCKETS: usize = 1400; // up to 10^6 s

/// Buckets whose bounds grow by two percent; a value is read back as its bucket's middle.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    sum_s: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; NUM_BUCKETS],
            total: 0,
            sum_s: 0.0,
        }
    }
}

impl Histogram {
    pub fn add(&mut self, seconds: f64) {
        let bucket = (seconds.max(LEAST_S) / LEAST_S).ln() / GROWTH.ln();
        self.counts[(bucket as usize).min(NUM_BUCKETS - 1)] += 1;
        self.total += 1;
        self.sum_s += seconds;
    }

    pub fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.total += other.total;
        self.sum_s += other.sum_s;
    }

    pub fn count(&self) -> u64 {
        self.total
    }

    pub fn mean_s(&self) -> Option<f64> {
        (self.total > 0).then(|| self.sum_s / self.total as f64)
    }

    /// The least of its values that `share` of them don't exceed; none of none.
    pub fn quantile_s(&self, share: f64) -> Option<f64> {
        let wanted = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut below = 0;
        for (bucket, &count) in self.counts.iter().enumerate() {
            below += count;
            if below >= wanted {
                return Some(LEAST_S * GROWTH.powf(bucket as f64 + 0.5));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_percent() {
        let (mut low, mut high) = (Histogram::default(), Histogram::default());
        for i in 1..=1000 {
            let half = if i <= 500 { &mut low } else { &mut high };
            half.add(f64::from(i) * 1e-3);
        }
        low.merge(&high);
        for (share, expected) in [(0.5, 0.5), (0.99, 0.99), (1.0, 1.0), (0.001, 0.001)] {
            let found = low.quantile_s(share).unwrap();
            assert!((found / expected - 1.0).abs() < 0.011, "{share}: {found}");
        }
        assert!((low.mean_s().unwrap() - 0.5005).abs() < 1e-9);
        assert_eq!(Histogram::default().quantile_s(0.5), None);
    }
}
