//! The random bits of a draw, a function of (seed, index of the answer's token) alone.

/// 64 random bits: `SplitMix64` as a counter-based generator.
///
/// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
pub fn random_bits(seed: u64, index: u64) -> u64 {
    const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
    mix64(mix64(seed).wrapping_add((index.wrapping_add(1)).wrapping_mul(GOLDEN)))
}

fn mix64(z: u64) -> u64 {
    let z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_those_of_splitmix64() {
        // The first outputs of the published generator from seed 0.
        assert_eq!(mix64(0), 0xE220_A839_7B1D_CDAF);
        assert_eq!(mix64(0x9E37_79B9_7F4A_7C15), 0x6E78_9E6A_A1B9_65F4);
    }

    #[test]
    fn every_bit_is_set_half_the_time_and_no_draw_repeats() {
        let draws: Vec<_> = (0..100)
            .flat_map(|seed| (0..100).map(move |index| random_bits(seed, index)))
            .collect();
        for bit in 0..64 {
            let num_set = draws.iter().filter(|&bits| bits >> bit & 1 == 1).count();
            assert!((4750..5250).contains(&num_set), "bit {bit}: {num_set}");
        }
        let distinct: std::collections::HashSet<_> = draws.iter().collect();
        assert_eq!(distinct.len(), draws.len());
    }
}
