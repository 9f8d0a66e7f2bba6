//! The arithmetic of the definition: a token's weight, its place in the order, its surprise.

/// The weight of the likeliest token.
pub const MAX_WEIGHT: u32 = 1 << 30;
/// Exponents are raised to it; the weight there is 0.
pub const LOWEST: f32 = -23.0;
/// log₂e in two parts.
pub const LOG2E: f32 = f32::from_bits(0x3FB8_AA3B);
pub const LOG2E_LO: f32 = f32::from_bits(0x32A5_7060);
/// 2ʳ for |r| ≤ ½ is 1 + r·(C[0] + r·(C[1] + …)), relative error 2⁻²²·⁵ in f32.
pub const POW2: [f32; 5] = [
    f32::from_bits(0x3F31_7215),
    f32::from_bits(0x3E75_FCDE),
    f32::from_bits(0x3D63_5BA9),
    f32::from_bits(0x3C1E_7544),
    f32::from_bits(0x3AAD_DD0A),
];
/// Surprises are whole multiples of 1 / this, in nats.
pub const SURPRISE_SCALE: f32 = 65536.0;

/// round(2³⁰·eʸ), of the exponent y = (x − max) / temperature ≤ 0.
#[inline(always)]
#[expect(clippy::manual_clamp, reason = "a NaN would stay one")]
pub fn weight(y: f32) -> u32 {
    let y = y.max(LOWEST).min(0.0);
    let n = (y * LOG2E).round_ties_even();
    let r = y.mul_add(LOG2E, -n);
    let r = y.mul_add(LOG2E_LO, r);
    let mut p = POW2[4];
    for coefficient in [POW2[3], POW2[2], POW2[1], POW2[0], 1.0] {
        p = p.mul_add(r, coefficient);
    }
    // SAFETY: −34 < n ≤ 0.
    let n = unsafe { n.to_int_unchecked::<i32>() };
    let scaled = f32::from_bits(p.to_bits().wrapping_add_signed((30 + n) << 23));
    // SAFETY: 0 < scaled ≤ 2³⁰, as p ≤ 1 where r ≤ 0, and n < 0 where r > 0.
    unsafe { scaled.round_ties_even().to_int_unchecked::<i32>() as u32 }
}

/// Ascends as the logit descends; −0 and 0 have one place.
#[inline(always)]
pub fn place(x: f32) -> u32 {
    let bits = (x + 0.0).to_bits();
    // Of positive numbers all bits but the sign are flipped, of negative ones none.
    bits ^ (!((bits as i32) >> 31) as u32 & 0x7FFF_FFFF)
}

/// An exponent y ≤ 0, scaled and rounded.
#[inline(always)]
#[expect(clippy::manual_clamp, reason = "a NaN would stay one")]
pub fn scaled_exponent(y: f32) -> i32 {
    let y = y.max(LOWEST).min(0.0);
    // SAFETY: |y| ≤ 23.
    unsafe { (y * SURPRISE_SCALE).round_ties_even().to_int_unchecked() }
}

/// The lowest mass that is no longer below `share` of `total`: what comes before a token that stays is less.
pub fn mass_limit(share: f64, total: u64) -> u64 {
    (share * total as f64).ceil() as u64
}

/// Where in 0..`total` the running sum must pass.
pub fn target(bits: u64, total: u64) -> u64 {
    ((u128::from(bits) * u128::from(total)) >> 64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_within_a_few_units_of_the_exponential() {
        assert_eq!(weight(0.0), MAX_WEIGHT);
        assert_eq!(weight(-0.0), MAX_WEIGHT);
        assert_eq!(weight(f32::NEG_INFINITY), 0);
        assert_eq!(weight(LOWEST), 0);
        for i in 0..2_400_000 {
            let y = -(i as f32) * 1e-5;
            let expected = f64::from(y).exp() * f64::from(MAX_WEIGHT);
            let error = (f64::from(weight(y)) - expected).abs();
            assert!(error <= 0.5 + expected * 2.0_f64.powi(-22), "{y}: {error}");
        }
    }

    #[test]
    fn no_weight_is_above_that_of_the_likeliest() {
        for bits in 0..1 << 20 {
            assert!(weight(-f32::from_bits(bits << 7)) <= MAX_WEIGHT);
        }
    }

    #[test]
    fn places_ascend_as_logits_descend() {
        let values = [
            f32::INFINITY,
            f32::MAX,
            1.0,
            1e-45,
            0.0,
            -1e-45,
            -1.0,
            f32::MIN,
            f32::NEG_INFINITY,
        ];
        assert!(values.is_sorted_by(|&a, &b| place(a) < place(b)));
        assert_eq!(place(-0.0), place(0.0));
    }

    #[test]
    fn targets_lie_below_the_total_and_shares_are_rounded_up() {
        assert_eq!(target(u64::MAX, 7), 6);
        assert_eq!(target(0, 7), 0);
        assert_eq!(target(1 << 63, 7), 3);
        assert_eq!(mass_limit(0.5, 7), 4);
        assert_eq!(mass_limit(0.5, 8), 4);
        assert_eq!(mass_limit(1e-300, 1 << 30), 1);
    }
}
