//! Blocks of bytes, written out by hand, against what their format says.

use super::*;

/// A block of ones: every group has scale `d` times what its bits give.
fn blocks(kind: GgmlType, count: usize) -> Vec<u8> {
    (0..kind.block().1 * count)
        .map(|i| (i * 37 % 61) as u8) // float16 of two such bytes is finite
        .collect()
}

#[test]
fn every_type_fills_whole_groups_and_rows_in_any_order() {
    for kind in ALL {
        let (columns, _) = kind.block();
        let bytes = blocks(kind, 2 * 5);
        let plain = from_ggml(kind, &bytes, 2 * columns, 5, None).unwrap();
        assert_eq!(plain.format(), kind.format());
        let order = [3, 0, 4, 1, 2];
        let ordered = from_ggml(kind, &bytes, 2 * columns, 5, Some(&order)).unwrap();
        for (row, &source) in order.iter().enumerate() {
            assert_eq!(ordered.quants(row), plain.quants(source), "{kind:?}");
            assert_eq!(ordered.scales(row), plain.scales(source), "{kind:?}");
            assert_eq!(ordered.mins(row), plain.mins(source), "{kind:?}");
        }
        assert_ne!(plain.quants(0), plain.quants(1));
    }
}

#[test]
fn a_large_weight_filled_by_threads_is_its_rows_filled_one_by_one() {
    let (rows, columns) = (1031, 512);
    let bytes = blocks(Q4_K, rows * 2);
    let whole = from_ggml(Q4_K, &bytes, columns, rows, None).unwrap();
    let (mut of_whole, mut alone) = (vec![0.0; columns], vec![0.0; columns]);
    for row in 0..rows {
        let bytes = &bytes[row * bytes.len() / rows..][..bytes.len() / rows];
        let single = from_ggml(Q4_K, bytes, columns, 1, None).unwrap();
        whole.dequantize(row, &mut of_whole);
        single.dequantize(0, &mut alone);
        assert_eq!(of_whole, alone);
    }
}

#[test]
fn scales_that_are_not_finite_are_refused() {
    for kind in ALL {
        let (columns, nbytes) = kind.block();
        let at = match kind {
            Q2_K => 80,
            Q3_K | Q6_K => nbytes - 2,
            _ => 0,
        };
        for scale in [f16::NAN, f16::INFINITY] {
            let mut bytes = vec![0x11; nbytes];
            bytes[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            let error = from_ggml(kind, &bytes, columns, 1, None).unwrap_err();
            assert!(
                error.to_string().contains("not finite"),
                "{kind:?}: {error}"
            );
        }
    }
}

#[test]
fn what_is_no_rows_of_blocks_is_refused() {
    let bytes = vec![0; 18 * 4];
    let refused = [
        (from_ggml(Q4_0, &bytes, 48, 3, None), "whole blocks of 32"),
        (from_ggml(Q4_0, &bytes, 0, 3, None), "whole blocks of 32"),
        (from_ggml(Q4_K, &bytes, 128, 1, None), "whole blocks of 256"),
        (from_ggml(Q4_0, &bytes, 64, 3, None), "blocks has length 72"),
        (from_ggml(Q4_0, &bytes, 64, usize::MAX, None), "overflows"),
        (from_ggml(Q4_0, &bytes, 64, 2, Some(&[0])), "order of rows"),
        (from_ggml(Q4_0, &bytes, 64, 2, Some(&[0, 2])), "row is 2"),
    ];
    for (result, part) in refused {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn numbers_are_those_of_files() {
    assert_eq!(GgmlType::from_number(12), Some(Q4_K));
    for dense in [0, 1, 30, 16, 39, u32::MAX] {
        assert_eq!(GgmlType::from_number(dense), None);
    }
}
