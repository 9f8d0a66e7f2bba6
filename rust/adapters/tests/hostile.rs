//! Hostile bytes: whatever is in the files, checking them answers and never panics.

mod common;

use std::fs;

use common::Peft;
use proptest::prelude::*;

#[test]
fn weights_truncated_anywhere_are_refused() {
    let peft = Peft::new();
    peft.write();
    let weights = peft.weights();
    let header = 8 + u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let cuts = (0..header).chain((header..weights.len()).step_by(97));
    for cut in cuts {
        fs::write(peft.weights_path(), &weights[..cut]).unwrap();
        assert!(
            peft.check_written().is_err(),
            "a file cut at {cut} is accepted"
        );
    }
}

#[test]
fn config_truncated_anywhere_is_refused() {
    let peft = Peft::new();
    peft.write();
    let config = peft.config.to_string();
    for cut in 0..config.len() {
        fs::write(peft.config_path(), &config[..cut]).unwrap();
        assert!(
            peft.check_written().is_err(),
            "a config cut at {cut} is accepted"
        );
    }
}

fn hostile() -> ProptestConfig {
    ProptestConfig {
        cases: 256,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(hostile())]

    #[test]
    fn arbitrary_bytes_as_weights_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        let peft = Peft::new();
        peft.write();
        fs::write(peft.weights_path(), bytes).unwrap();
        prop_assert!(peft.check_written().is_err());
    }

    #[test]
    fn arbitrary_headers_are_refused(header in r#"[\{\}\[\]":,a-z0-9_ -]{0,80}"#) {
        let peft = Peft::new();
        peft.write();
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
        fs::write(peft.weights_path(), bytes).unwrap();
        prop_assert!(peft.check_written().is_err());
    }

    #[test]
    fn flipped_header_bytes_never_panic(position in 0..800_usize, flip in 1..=255_u8) {
        let peft = Peft::new();
        peft.write();
        let mut weights = peft.weights();
        weights[position] ^= flip;
        fs::write(peft.weights_path(), weights).unwrap();
        let _ = peft.check_written();
    }

    #[test]
    fn huge_shapes_and_offsets_are_refused(rows: u64, columns: u64, start: u64, end: u64) {
        let peft = Peft::new();
        peft.write();
        let header = format!(
            r#"{{"{}":{{"dtype":"F32","shape":[{rows},{columns}],"data_offsets":[{start},{end}]}}}}"#,
            common::Q_A
        );
        let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat();
        fs::write(peft.weights_path(), bytes).unwrap();
        prop_assert!(peft.check_written().is_err());
    }

    #[test]
    fn arbitrary_configs_never_panic(field in "[a-z_]{1,12}|r|rank_pattern|target_modules|layers_pattern",
                                     text in any::<String>(), number: f64) {
        let mut peft = Peft::new();
        for value in [serde_json::json!(text), serde_json::json!([text]), serde_json::json!({text: number})] {
            peft.config[&field] = value;
            let _ = peft.check();
        }
    }
}
