//! Embeddings and heads in an adapter's file: rows equal to the base's are left out, others are packed.

#[path = "../common/mod.rs"]
mod common;
mod heads;
mod norms;
mod refusals;
mod token_lora;

use std::path::Path;

use common::{HIDDEN, LIMITS, Peft, Tensor, assert_error, base};
use half::bf16;
use loraserve_adapters::{
    AdapterLayout, BaseModel, BaseShape, BaseWeights, ErrorKind, Limits, Pace, Panels, Place,
    Receipt, Registered, Result, RowsLayout, StorageDtype, StoredWeight, check_paced, load_paced,
    row_digests,
};
use safetensors::Dtype;
use serde_json::json;

const EMBED: &str = "base_model.model.model.embed_tokens.weight";
const HEAD: &str = "base_model.model.lm_head.weight";
const EMBED_TOKENS: &str =
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
const HEAD_TOKENS: &str = "base_model.model.lm_head.token_adapter.trainable_tokens_delta";
/// More than the bytes compared at a time.
const SHAPE: [usize; 2] = [40_000, HIDDEN];

fn value(index: usize) -> f32 {
    (index % 251) as f32 / 64.0 - 1.0
}

/// A base whose embedding and head hold `value`, stored as `dtype`.
struct Stored {
    dtype: StorageDtype,
    is_tied: bool,
}

const UNTIED: Stored = Stored {
    dtype: StorageDtype::Float32,
    is_tied: false,
};
const TIED: Stored = Stored {
    is_tied: true,
    ..UNTIED
};

impl BaseWeights for Stored {
    fn stored(&self, _module: &str) -> std::result::Result<StoredWeight, String> {
        let values = (0..SHAPE[0] * SHAPE[1]).map(value);
        let bytes: Vec<u8> = match self.dtype {
            StorageDtype::Float32 => values.flat_map(f32::to_le_bytes).collect(),
            _ => values
                .flat_map(|value| bf16::from_f32(value).to_le_bytes())
                .collect(),
        };
        Ok(StoredWeight {
            shape: SHAPE,
            digests: row_digests(&bytes, SHAPE[1] * self.dtype.size()),
            is_tied: self.is_tied,
        })
    }
}

fn check(path: &Path, stored: &Stored) -> Result<Receipt> {
    let limits = Limits {
        dtype: stored.dtype,
        ..LIMITS
    };
    check_paced(
        Place::Directory(path),
        &base(),
        limits,
        Some(stored),
        &Pace::default(),
    )
}

/// Loads with what the receipt knows, and without; both must be the same.
fn load(path: &Path, stored: &Stored, receipt: &Receipt) -> (AdapterLayout, Vec<u8>) {
    let load = |known, weights| {
        let mut extent = vec![1; receipt.nbytes];
        let limits = Limits {
            dtype: stored.dtype,
            ..LIMITS
        };
        let model = BaseModel {
            linears: None,
            weights,
        };
        let registered = Registered {
            hash: &receipt.hash,
            rows: known,
        };
        let layout = load_paced(
            Place::Directory(path),
            &base(),
            limits,
            registered,
            &mut extent,
            model,
            &Pace::default(),
        );
        (layout.unwrap(), extent)
    };
    let known = load(Some(&receipt.replaced_rows), None);
    assert_eq!(known, load(None, Some(stored)));
    known
}

/// (token, row) pairs of a block.
fn rows_in(extent: &[u8], layout: RowsLayout) -> Vec<(i32, Vec<f32>)> {
    let words = |offset: usize| &extent[offset..];
    let token = |index: usize| {
        let bytes = words(layout.tokens_offset + 4 * index);
        i32::from_le_bytes(bytes[..4].try_into().unwrap())
    };
    let panels = layout.panels(StorageDtype::Float32);
    let element = |row, column| {
        let bytes = words(layout.panels_offset + 4 * panels.index(row, column));
        f32::from_le_bytes(bytes[..4].try_into().unwrap())
    };
    let row = |row| {
        (0..layout.width)
            .map(|column| element(row, column))
            .collect()
    };
    (0..layout.count)
        .map(|index| (token(index), row(index)))
        .collect()
}

fn with_tables(names: &[&str]) -> Peft {
    let mut peft = Peft::new();
    for name in names {
        peft.set(name, Tensor::f32(&SHAPE, value));
    }
    peft.write();
    peft
}

/// The base's values but for some rows, which hold the row's number and `mark`.
fn with_rows(rows: &'static [usize], mark: f32) -> Tensor {
    Tensor::f32(&SHAPE, move |index| {
        let row = index / SHAPE[1];
        if rows.contains(&row) {
            row as f32 + mark
        } else {
            value(index)
        }
    })
}

fn constant_rows(rows: &[(i32, f32)]) -> Vec<(i32, Vec<f32>)> {
    rows.iter()
        .map(|(token, value)| (*token, vec![*value; SHAPE[1]]))
        .collect()
}

#[test]
fn copies_of_the_base_cost_nothing_and_change_nothing() {
    let plain = with_tables(&[]);
    let plain = check(plain.path(), &UNTIED).unwrap();
    let peft = with_tables(&[EMBED, HEAD]);
    let receipt = check(peft.path(), &UNTIED).unwrap();
    assert_eq!(receipt.base_copies, ["embed_tokens", "lm_head"]);
    let same = Receipt {
        base_copies: vec![],
        is_compared: false,
        replaced_rows: plain.replaced_rows.clone(),
        directory: plain.directory.clone(),
        ..receipt.clone()
    };
    assert_eq!(same, plain);
    let (layout, _) = load(peft.path(), &UNTIED, &receipt);
    assert_eq!((layout.embedding, layout.head), (None, None));
}

#[test]
fn copies_are_compared_as_they_are_stored() {
    let stored = Stored {
        dtype: StorageDtype::BFloat16,
        is_tied: false,
    };
    let mut peft = Peft::new();
    let bytes = |value: f32| bf16::from_f32(value).to_le_bytes();
    let bytes = (0..SHAPE[0] * SHAPE[1])
        .flat_map(|index| bytes(value(index)))
        .collect();
    peft.set(
        HEAD,
        Tensor {
            dtype: Dtype::BF16,
            shape: SHAPE.to_vec(),
            bytes,
        },
    );
    peft.write();
    for peft in [peft, with_tables(&[HEAD])] {
        let receipt = check(peft.path(), &stored).unwrap();
        assert_eq!(receipt.base_copies, ["lm_head"]);
    }
}

#[test]
fn rows_that_differ_are_packed_with_their_tokens() {
    let mut peft = Peft::new();
    peft.config["modules_to_save"] = json!(["embed_tokens", "lm_head"]);
    peft.set(EMBED, with_rows(&[5, 6, 39_999], 0.5));
    peft.set(HEAD, with_rows(&[0], 0.25));
    peft.write();
    for stored in [UNTIED, TIED] {
        let receipt = check(peft.path(), &stored).unwrap();
        assert_eq!(receipt.base_copies, [""; 0]);
        assert!(receipt.alone.unwrap().contains("rows of embedding or head"));
        let place = "rows in place of the base's";
        let notes = [format!("embedding: 3 {place}"), format!("head: 1 {place}")];
        assert_eq!(receipt.notes, notes);
        let (layout, extent) = load(peft.path(), &stored, &receipt);
        let rows = rows_in(&extent, layout.embedding.unwrap());
        let expected = constant_rows(&[(5, 5.5), (6, 6.5), (39_999, 39_999.5)]);
        assert_eq!(rows, expected);
        assert_eq!(
            rows_in(&extent, layout.head.unwrap()),
            constant_rows(&[(0, 0.25)])
        );
        assert!(extent[extent.len() - 1024..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn what_peft_ties_is_one_block() {
    let trained = || with_rows(&[9], 0.5);
    let tokens = || Tensor::f32(&[2, HIDDEN], |index| (index / HIDDEN) as f32 + 0.5);
    let of_tokens = constant_rows(&[(3, 1.5), (8, 0.5)]);
    let of_nine = constant_rows(&[(9, 9.5)]);
    let none = Vec::new;
    for (config, tensors, stored, embedding, head) in [
        // Saved with the model's own embeddings, which PEFT loads over the base's.
        (
            json!({}),
            vec![(EMBED, trained())],
            TIED,
            of_nine.clone(),
            of_nine.clone(),
        ),
        (
            json!({}),
            vec![(HEAD, trained())],
            TIED,
            of_nine.clone(),
            of_nine.clone(),
        ),
        (
            json!({}),
            vec![(EMBED, trained())],
            UNTIED,
            of_nine.clone(),
            none(),
        ),
        (
            json!({"modules_to_save": ["embed_tokens"]}),
            vec![(EMBED, trained())],
            TIED,
            of_nine.clone(),
            none(),
        ),
        (
            json!({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": true}),
            vec![(EMBED, trained())],
            TIED,
            of_nine.clone(),
            of_nine.clone(),
        ),
        (
            json!({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": true}),
            vec![(EMBED, trained())],
            UNTIED,
            of_nine.clone(),
            none(),
        ),
        (
            json!({"trainable_token_indices": [8, 3]}),
            vec![(EMBED_TOKENS, tokens())],
            TIED,
            of_tokens.clone(),
            of_tokens.clone(),
        ),
        (
            json!({"trainable_token_indices": [8, 3]}),
            vec![(EMBED_TOKENS, tokens())],
            UNTIED,
            of_tokens.clone(),
            none(),
        ),
        (
            json!({"trainable_token_indices": {"lm_head": [8, 3]}}),
            vec![(HEAD_TOKENS, tokens())],
            TIED,
            none(),
            of_tokens.clone(),
        ),
    ] {
        let mut peft = Peft::new();
        for (field, value) in config.as_object().unwrap() {
            peft.config[field] = value.clone();
        }
        for (name, tensor) in tensors {
            peft.set(name, tensor);
        }
        peft.write();
        let receipt = check(peft.path(), &stored).unwrap();
        let (layout, extent) = load(peft.path(), &stored, &receipt);
        let rows =
            |layout: Option<RowsLayout>| layout.map_or_else(Vec::new, |l| rows_in(&extent, l));
        let found = (rows(layout.embedding), rows(layout.head));
        assert_eq!(found, (embedding, head), "{config}");
        if found.0 == found.1 {
            assert_eq!(layout.embedding, layout.head);
        }
    }
}

#[test]
fn trained_tokens_lie_over_the_rows_of_a_whole_table() {
    let mut peft = Peft::new();
    peft.config["trainable_token_indices"] = json!([7, 9]);
    let wrapped = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight";
    peft.set(wrapped, with_rows(&[7, 8], 0.5));
    // Token 9 is left as the base has it.
    let tokens = Tensor::f32(&[2, HIDDEN], |index| {
        if index < HIDDEN {
            1.0
        } else {
            value(8 * HIDDEN + index)
        }
    });
    peft.set(EMBED_TOKENS, tokens);
    peft.write();
    let receipt = check(peft.path(), &UNTIED).unwrap();
    let (layout, extent) = load(peft.path(), &UNTIED, &receipt);
    let rows = rows_in(&extent, layout.embedding.unwrap());
    assert_eq!(rows, constant_rows(&[(7, 1.0), (8, 8.5)]));
}

#[test]
fn rows_are_part_of_what_an_adapter_is() {
    let mut hashes = Vec::new();
    for (name, rows, mark) in [
        (EMBED, &[5_usize] as &[usize], 0.5),
        (EMBED, &[5], 0.75),
        (EMBED, &[6], 0.5),
        (EMBED, &[5, 6], 0.5),
        (HEAD, &[5], 0.5),
        (HEAD, &[], 0.5),
    ] {
        let mut peft = Peft::new();
        peft.set(name, with_rows(rows, mark));
        peft.write();
        hashes.push(check(peft.path(), &UNTIED).unwrap().hash);
    }
    let distinct: std::collections::BTreeSet<_> = hashes.iter().collect();
    assert_eq!(distinct.len(), hashes.len());
}

#[test]
fn modules_to_save_may_list_tables_that_are_there() {
    let mut peft = Peft::new();
    peft.config["modules_to_save"] = json!(["model.embed_tokens", "lm_head"]);
    peft.set(EMBED, Tensor::f32(&SHAPE, value));
    peft.write();
    assert_error(
        check(peft.path(), &UNTIED),
        "field 'modules_to_save' lists \"lm_head\", whose weight is not in the file",
    );
    peft.set(HEAD, Tensor::f32(&SHAPE, value));
    peft.write();
    check(peft.path(), &UNTIED).unwrap();
}

#[test]
fn tokens_beyond_the_bases_are_rows_too() {
    let mut peft = Peft::new();
    peft.config["modules_to_save"] = json!(["embed_tokens", "lm_head"]);
    let resized = |rows| Tensor::f32(&[rows, HIDDEN], value);
    for (embedding, head, added, of_head, vocabulary) in [
        (40_002, 40_002, 2, 2, Some(40_002)),
        (40_002, 40_000, 2, 0, None),
        // Of a base that was cut down to its tokenizer's tokens.
        (39_990, 39_990, 0, 0, Some(39_990)),
        (40_000, 40_000, 0, 0, None),
    ] {
        peft.set(EMBED, resized(embedding));
        peft.set(HEAD, resized(head));
        peft.write();
        let receipt = check(peft.path(), &UNTIED).unwrap();
        let rows = &receipt.replaced_rows;
        let expected: Vec<u32> = (40_000..40_000 + added).collect();
        assert_eq!(rows.added_tokens().collect::<Vec<_>>(), expected);
        assert_eq!(rows.added_head_tokens().count(), of_head);
        assert_eq!(rows.vocabulary, vocabulary);
        assert_eq!(receipt.alone.is_some(), embedding != 40_000);
        let (layout, extent) = load(peft.path(), &UNTIED, &receipt);
        assert_eq!(layout.vocabulary, vocabulary);
        let found = layout
            .embedding
            .map_or_else(Vec::new, |l| rows_in(&extent, l));
        let of_token = |token: u32| {
            let first = token as usize * HIDDEN;
            (token as i32, (first..first + HIDDEN).map(value).collect())
        };
        assert_eq!(
            found,
            expected.iter().copied().map(of_token).collect::<Vec<_>>()
        );
    }
}
