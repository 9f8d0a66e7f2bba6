use std::thread;

use proptest::prelude::*;

use super::*;

/// An adapter of whole mapped pages, less some bytes at its end; its bytes say which it is.
struct Adapter {
    hash: String,
    extent: Vec<u8>,
    layout: Arc<AdapterLayout>,
}

fn adapter(number: usize, num_mapped: usize) -> Adapter {
    let nbytes = num_mapped * MAPPED_NBYTES - 64;
    let values = (0..nbytes + 192).map(|i| (number * 31 + i % 251) as u8);
    Adapter {
        hash: format!("hash of {number}"),
        extent: values.collect(),
        layout: Arc::new(AdapterLayout {
            groups: Vec::new(),
            embedding: None,
            head: None,
            embedding_lora: None,
            head_lora: None,
            norms: Vec::new(),
            vocabulary: None,
            nbytes,
        }),
    }
}

fn keep(tier: &HostTier, adapter: &Adapter) {
    tier.keep(
        &adapter.hash,
        &adapter.extent,
        &adapter.layout,
        &Pace::default(),
    );
}

fn check_bytes(packed: &PackedAdapter, adapter: &Adapter) {
    let (nbytes, mut extent) = (adapter.layout.nbytes, vec![7; adapter.extent.len() + 64]);
    packed.copy_to(&mut extent, &Pace::default());
    assert_eq!(extent[..nbytes], adapter.extent[..nbytes]);
    assert!(extent[nbytes..].iter().all(|byte| *byte == 0));
    assert_eq!(packed.bytes(), &adapter.extent[..nbytes]);
}

fn tier(num_mapped: usize) -> HostTier {
    HostTier::new(num_mapped * MAPPED_NBYTES)
}

#[test]
fn what_is_kept_comes_back_as_it_lay_with_zeros_behind_it() {
    let (tier, kept) = (tier(300), adapter(1, 257)); // more than a chunk
    assert!(tier.find(&kept.hash).is_none());
    keep(&tier, &kept);
    let packed = tier.find(&kept.hash).unwrap();
    check_bytes(&packed, &kept);
    assert!(Arc::ptr_eq(packed.layout(), &kept.layout));
    let stats = HostTierStats {
        limit_nbytes: 300 * MAPPED_NBYTES,
        nbytes: 257 * MAPPED_NBYTES,
        num_adapters: 1,
        num_hits: 1,
        num_misses: 1,
        ..HostTierStats::default()
    };
    assert_eq!(tier.stats(), stats);
}

#[test]
fn the_one_used_longest_ago_gives_way() {
    let (tier, adapters) = (tier(6), [1, 2, 3, 4].map(|number| adapter(number, 2)));
    adapters[..3].iter().for_each(|one| keep(&tier, one));
    assert!(tier.find(&adapters[0].hash).is_some());
    keep(&tier, &adapters[3]);
    let kept = adapters
        .each_ref()
        .map(|one| tier.find(&one.hash).is_some());
    assert_eq!(kept, [true, false, true, true]);
    assert_eq!(tier.stats().num_evictions, 1);
}

#[test]
fn what_could_never_fit_pushes_nobody_out() {
    let (tier, small, large) = (tier(4), adapter(1, 1), adapter(2, 5));
    keep(&tier, &small);
    keep(&tier, &large);
    assert!(tier.find(&large.hash).is_none());
    assert!(tier.find(&small.hash).is_some());
}

#[test]
fn bytes_count_as_long_as_somebody_has_them() {
    let (tier, first, second) = (tier(4), adapter(1, 3), adapter(2, 3));
    keep(&tier, &first);
    let copied = tier.find(&first.hash).unwrap();
    keep(&tier, &second);
    assert!(
        tier.find(&second.hash).is_none(),
        "the first can't give way while it is copied"
    );
    tier.retain(|_| false);
    assert!(tier.find(&first.hash).is_none());
    assert_eq!(tier.stats().nbytes, 3 * MAPPED_NBYTES);
    check_bytes(&copied, &first);
    drop(copied);
    assert_eq!(tier.stats().nbytes, 0);
    keep(&tier, &second);
    assert!(tier.find(&second.hash).is_some());
}

#[test]
fn a_tier_of_nothing_keeps_and_counts_nothing() {
    let (tier, one) = (tier(0), adapter(1, 1));
    keep(&tier, &one);
    assert!(tier.find(&one.hash).is_none());
    assert_eq!(tier.stats(), HostTierStats::default());
}

#[test]
fn without_memory_an_adapter_is_counted_and_not_kept() {
    let no_memory = |_| Err(io::Error::from(io::ErrorKind::OutOfMemory));
    let (tier, one) = (HostTier::with_map(1 << 20, no_memory), adapter(1, 1));
    keep(&tier, &one);
    assert!(tier.find(&one.hash).is_none());
    let stats = tier.stats();
    assert_eq!((stats.num_failures, stats.nbytes), (1, 0));
}

#[test]
fn threads_that_keep_find_and_forget_stay_within_the_limit() {
    let (tier, limit) = (tier(40), 40 * MAPPED_NBYTES);
    let adapters: Vec<_> = (0..24)
        .map(|number| adapter(number, 1 + number % 7))
        .collect();
    thread::scope(|scope| {
        for thread in 0..4 {
            let (tier, adapters) = (&tier, &adapters);
            scope.spawn(move || {
                for step in 0..2000 {
                    let one = &adapters[(step * (2 * thread + 1) + thread) % adapters.len()];
                    match tier.find(&one.hash) {
                        Some(packed) => check_bytes(&packed, one),
                        None => keep(tier, one),
                    }
                    if step % 97 == 0 {
                        tier.retain(|hash| *hash != one.hash);
                    }
                    assert!(tier.stats().nbytes <= limit);
                }
            });
        }
    });
    let stats = tier.stats();
    assert!(stats.num_hits > 0 && stats.num_evictions > 0);
    assert_eq!(stats.num_hits + stats.num_misses, 8000);
    tier.retain(|_| false);
    assert_eq!(tier.stats().nbytes, 0, "nothing is leaked");
}

#[derive(Clone, Debug)]
enum Op {
    Keep(usize),
    Find(usize),
    /// Find, and hold the bytes until the next one that is held.
    Hold(usize),
    Forget(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let number = 0..12_usize;
    let op = prop_oneof![
        3 => number.clone().prop_map(Op::Keep),
        2 => number.clone().prop_map(Op::Find),
        1 => number.clone().prop_map(Op::Hold),
        1 => number.prop_map(Op::Forget),
    ];
    prop::collection::vec(op, 1..80)
}

/// What the tier means: copies in order of use, and the one that somebody has.
#[derive(Default)]
struct Model {
    /// (adapter, which copy of it)
    kept: Vec<(usize, usize)>,
    held: Option<(usize, usize)>,
    num_copies: usize,
}

/// Mapped pages.
fn size(number: usize) -> usize {
    1 + number % 5
}

impl Model {
    fn used(&self) -> usize {
        let held = self.held.filter(|held| !self.kept.contains(held));
        self.kept
            .iter()
            .chain(&held)
            .map(|&(number, _)| size(number))
            .sum()
    }

    fn keep(&mut self, number: usize, limit: usize) {
        if self.kept.iter().any(|(kept, _)| *kept == number) || size(number) > limit {
            return;
        }
        while self.used() + size(number) > limit {
            let mut idle = self.kept.iter();
            let Some(oldest) = idle.position(|copy| Some(*copy) != self.held) else {
                return;
            };
            self.kept.remove(oldest);
        }
        self.num_copies += 1;
        self.kept.push((number, self.num_copies));
    }

    fn find(&mut self, number: usize) -> Option<(usize, usize)> {
        let place = self.kept.iter().position(|(kept, _)| *kept == number)?;
        let copy = self.kept.remove(place);
        self.kept.push(copy);
        Some(copy)
    }
}

proptest! {
    #[test]
    fn random_operations_stay_within_the_limit_and_find_what_the_model_has(
        ops in ops(),
        limit in 0..16_usize,
    ) {
        let (tier, mut model) = (tier(limit), Model::default());
        let adapters: Vec<_> = (0..12).map(|number| adapter(number, size(number))).collect();
        let mut held = None;
        for op in ops {
            match op {
                Op::Keep(number) => {
                    keep(&tier, &adapters[number]);
                    model.keep(number, limit);
                }
                Op::Find(number) | Op::Hold(number) => {
                    let found = tier.find(&adapters[number].hash);
                    let expected = model.find(number);
                    prop_assert_eq!(found.is_some(), expected.is_some());
                    if let Some(packed) = found {
                        check_bytes(&packed, &adapters[number]);
                        if matches!(op, Op::Hold(_)) {
                            (held, model.held) = (Some(packed), expected);
                        }
                    }
                }
                Op::Forget(number) => {
                    tier.retain(|hash| hash != adapters[number].hash);
                    model.kept.retain(|(kept, _)| *kept != number);
                }
            }
            let stats = tier.stats();
            prop_assert!(stats.nbytes <= stats.limit_nbytes);
            prop_assert_eq!(stats.nbytes, model.used() * MAPPED_NBYTES);
            prop_assert_eq!(stats.num_adapters, model.kept.len());
        }
        drop(held);
        model.held = None;
        prop_assert_eq!(tier.stats().nbytes, model.used() * MAPPED_NBYTES);
    }
}
