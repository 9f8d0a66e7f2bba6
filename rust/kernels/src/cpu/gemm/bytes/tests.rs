//! Products with quantised weights on every instruction set, beside sums in float64.

use crate::KernelError;
use crate::cpu::gemm::{Epilogue, gemm};
use crate::cpu::linear::PackedLinear;
use crate::cpu::memory::Arena;
use crate::cpu::simd::Isa;
use crate::cpu::threads::ThreadPool;
use crate::quantized::{QuantBits, QuantFormat, QuantizedWeight};

/// Numbers of a seed, the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    /// In −1..1.
    fn float(&mut self) -> f32 {
        (self.next() % (1 << 24)) as f32 / f32::from(1_u8 << 7).powi(3) / 4.0 - 1.0
    }
}

fn formats() -> Vec<QuantFormat> {
    let mut formats = Vec::new();
    for bits in [QuantBits::Four, QuantBits::Eight] {
        for group in [16, 32] {
            for has_mins in [false, true] {
                formats.push(QuantFormat {
                    bits,
                    group,
                    has_mins,
                });
            }
        }
    }
    formats
}

/// A weight whose scales are float16 multiples of one power of two, and which has every value.
fn weight(format: QuantFormat, k: usize, n: usize, random: &mut Random) -> QuantizedWeight {
    let limit = match format.bits {
        QuantBits::Four => 16,
        QuantBits::Eight => 256,
    };
    let quants = (0..n * k).map(|_| (random.next() % limit) as u8).collect();
    let num_groups = n * k / format.group;
    let mut halves = |num: usize| -> Vec<f32> {
        let half = |value| half::f16::from_f32(value).to_f32() / 64.0;
        (0..num).map(|_| half(random.float())).collect()
    };
    let scales = halves(num_groups);
    let mins = halves(if format.has_mins { num_groups } else { 0 });
    QuantizedWeight::new(format, k, n, quants, scales, mins).expect("the weight is whole")
}

/// x as it is multiplied, and a bound of each product's rounding.
fn quantized(row: &[f32]) -> Vec<f64> {
    let groups = row.chunks(32).flat_map(|group| {
        let largest = group.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
        let scale = f64::from(largest / 127.0);
        group
            .iter()
            .map(move |x| f64::from((x * inverse).round_ties_even()) * scale)
            .collect::<Vec<_>>()
    });
    groups.collect()
}

fn product(isa: Isa, pool: &ThreadPool, x: &[f32], packed: &PackedLinear) -> Vec<f32> {
    let num_rows = x.len() / packed.in_features();
    let mut y = vec![0.0; num_rows * packed.out_features()];
    gemm(pool, isa, x, packed, None, Epilogue::Store, &mut y).expect("lengths agree");
    y
}

#[test]
fn products_are_those_of_the_dequantised_weight_with_rows_of_bytes() {
    let pool = ThreadPool::new(Some(2));
    let arena = Arena::default();
    let mut random = Random(7);
    for format in formats() {
        for (k, n, m) in [(32, 16, 1), (96, 40, 3), (160, 7, 13), (576, 33, 9)] {
            let weight = weight(format, k, n, &mut random);
            let packed = PackedLinear::pack_quantized(&pool, &arena, &[&weight], None);
            let packed = packed.expect("the weight can be packed");
            let x: Vec<f32> = (0..m * k).map(|_| random.float() * 3.0).collect();
            let mut row_weights = vec![0.0; k];
            for isa in Isa::supported() {
                let y = product(isa, &pool, &x, &packed);
                for column in 0..n {
                    weight.dequantize(column, &mut row_weights);
                    for row in 0..m {
                        let a = quantized(&x[row * k..(row + 1) * k]);
                        let terms = a.iter().zip(&row_weights).map(|(a, w)| a * f64::from(*w));
                        let size: f64 = terms.clone().map(f64::abs).sum();
                        let (expected, found) = (terms.sum::<f64>(), y[row * n + column]);
                        let error = (f64::from(found) - expected).abs();
                        // Of a zero or a minimum, products are summed apart, and may be fifteen times as large.
                        assert!(
                            error <= 4e-6 * size + 1e-7,
                            "{isa:?} {format:?} [{m}, {k}] x [{n}, {k}]: {found}, expected {expected}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_has_the_same_bits_alone_and_among_others() {
    let pool = ThreadPool::new(Some(2));
    let arena = Arena::default();
    let mut random = Random(11);
    for format in formats() {
        let (k, n, m) = (192, 48, 23);
        let weight = weight(format, k, n, &mut random);
        let packed = PackedLinear::pack_quantized(&pool, &arena, &[&weight], None);
        let packed = packed.expect("the weight can be packed");
        let x: Vec<f32> = (0..m * k).map(|_| random.float()).collect();
        for isa in Isa::supported() {
            let alone: Vec<_> = x
                .chunks(k)
                .flat_map(|row| product(isa, &pool, row, &packed))
                .collect();
            // Tiles of every height: 2 and 1; 4 and 4; 6 or 4, then 4 and 1.
            for num_rows in [3, 8, m] {
                let together = product(isa, &pool, &x[..num_rows * k], &packed);
                let is_same = alone[..num_rows * n] == together;
                assert!(is_same, "{isa:?} {format:?}, {num_rows} rows");
            }
        }
    }
}

#[test]
fn parts_of_several_formats_are_one_weight() {
    let pool = ThreadPool::new(Some(2));
    let arena = Arena::default();
    let mut random = Random(13);
    let (k, m) = (64, 5);
    let weights: Vec<_> = formats()
        .into_iter()
        .map(|format| weight(format, k, 32, &mut random))
        .collect();
    let parts: Vec<_> = weights.iter().collect();
    let bias: Vec<f32> = (0..32 * parts.len()).map(|_| random.float()).collect();
    let fused = PackedLinear::pack_quantized(&pool, &arena, &parts, Some(&bias));
    let fused = fused.expect("every part ends with its panel");
    let x: Vec<f32> = (0..m * k).map(|_| random.float()).collect();
    for isa in Isa::supported() {
        let y = product(isa, &pool, &x, &fused);
        for (index, part) in parts.iter().enumerate() {
            let own = &bias[index * 32..(index + 1) * 32];
            let alone = PackedLinear::pack_quantized(&pool, &arena, &[part], Some(own));
            let alone = product(isa, &pool, &x, &alone.expect("a part is a weight"));
            for row in 0..m {
                let start = row * fused.out_features() + index * 32;
                assert_eq!(y[start..start + 32], alone[row * 32..(row + 1) * 32]);
            }
        }
    }
}

#[test]
fn rows_of_a_packed_weight_are_those_it_was_made_of() {
    let pool = ThreadPool::new(Some(1));
    let arena = Arena::default();
    let mut random = Random(17);
    for format in formats() {
        let (k, n) = (96, 21);
        let weight = weight(format, k, n, &mut random);
        let packed = PackedLinear::pack_quantized(&pool, &arena, &[&weight], None);
        let packed = packed.expect("the weight can be packed");
        let (mut expected, mut found) = (vec![0.0; k], vec![0.0_f32; k]);
        for index in 0..n {
            weight.dequantize(index, &mut expected);
            packed.unpack_row::<f32, f32>(index, &mut found);
            for (found, expected) in found.iter().zip(&expected) {
                assert!(
                    (found - expected).abs() <= 1e-6 * expected.abs() + 1e-9,
                    "{format:?}: {found}, expected {expected}"
                );
            }
        }
    }
}

#[test]
fn what_is_not_a_number_stays_so() {
    let pool = ThreadPool::new(Some(1));
    let mut random = Random(19);
    let format = formats()[0];
    let weight = weight(format, 64, 16, &mut random);
    let packed = PackedLinear::pack_quantized(&pool, &Arena::default(), &[&weight], None);
    let packed = packed.expect("the weight can be packed");
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = vec![0.5; 2 * 64];
        x[70] = value;
        for isa in Isa::supported() {
            let y = product(isa, &pool, &x, &packed);
            assert!(y[..16].iter().all(|y| y.is_finite()), "{isa:?}");
            assert!(y[16..].iter().all(|y| y.is_nan()), "{isa:?} {value}");
        }
    }
}

#[test]
fn rows_that_do_not_fill_panels_before_another_format_are_refused() {
    let pool = ThreadPool::new(Some(1));
    let mut random = Random(23);
    let [one, other] =
        [formats()[0], formats()[7]].map(|format| weight(format, 32, 24, &mut random));
    let packed = PackedLinear::pack_quantized(&pool, &Arena::default(), &[&one, &other], None);
    assert!(matches!(packed.err(), Some(KernelError::Length { .. })));
    let packed = PackedLinear::pack_quantized(&pool, &Arena::default(), &[&one, &one], None);
    assert_eq!(packed.expect("one format shares panels").out_features(), 48);
}
