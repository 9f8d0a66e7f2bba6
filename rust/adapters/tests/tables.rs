//! Embeddings and heads in an adapter's file: rows equal to the base's are left out, others are packed.

mod common;

use std::path::Path;

use common::{HIDDEN, LIMITS, Peft, Tensor, assert_error, base};
use half::bf16;
use loraserve_adapters::{
    AdapterLayout, BaseModel, BaseWeights, ErrorKind, Limits, Pace, Place, Receipt, Registered,
    Result, RowsLayout, StorageDtype, StoredWeight, check_paced, load_paced, row_digests,
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
fn a_file_whose_rows_changed_is_refused_at_the_next_load() {
    let mut peft = Peft::new();
    peft.set(EMBED, with_rows(&[5], 0.5));
    peft.write();
    let receipt = check(peft.path(), &UNTIED).unwrap();
    peft.set(EMBED, with_rows(&[5], 0.75));
    peft.write();
    let mut extent = vec![0; receipt.nbytes];
    for known in [Some(&receipt.replaced_rows), None] {
        let model = BaseModel {
            linears: None,
            weights: Some(&UNTIED),
        };
        let (shape, pace) = (base(), Pace::default());
        let extent = &mut extent;
        let registered = Registered {
            hash: &receipt.hash,
            rows: known,
        };
        let loaded = load_paced(
            Place::Directory(peft.path()),
            &shape,
            LIMITS,
            registered,
            extent,
            model,
            &pace,
        );
        assert_eq!(loaded.unwrap_err().kind(), ErrorKind::Unavailable);
    }
}

#[test]
fn a_table_that_does_not_fit_is_refused() {
    for (tensor, fragment) in [
        (
            Tensor::f32(&[40_002, 16], value),
            "it has rows of tokens from 40000 on, for which the base has none",
        ),
        (
            Tensor::f32(&[39_999, 16], value),
            "it has 39999 rows, the base 40000",
        ),
        (
            Tensor::f32(&[40_000, 8], value),
            "its shape is [40000, 8], the base's [40000, 16]",
        ),
        (Tensor::f32(&[16], value), "its shape is [16]"),
        (
            Tensor {
                dtype: Dtype::I8,
                shape: vec![40_000, 16],
                bytes: vec![0; 640_000],
            },
            "its dtype is I8",
        ),
    ] {
        let mut peft = Peft::new();
        peft.set(HEAD, tensor);
        peft.write();
        let refused = check(peft.path(), &UNTIED);
        assert_error(
            refused,
            &format!("tensor {HEAD} can't take the place of the base's lm_head: {fragment}"),
        );
    }
    let mut peft = Peft::new();
    peft.set(HEAD, with_rows(&[3], f32::INFINITY));
    peft.write();
    let element = format!("holds inf at element {}", 3 * HIDDEN);
    assert_error(check(peft.path(), &UNTIED), &element);
}

#[test]
fn without_the_bases_weights_no_table_is_taken() {
    let peft = with_tables(&[HEAD]);
    assert_error(peft.check_written(), "the base's weights are not at hand");
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
fn tokens_and_their_rows_must_agree() {
    let field = "trainable_token_indices";
    let rows = |count: usize| Tensor::f32(&[count, HIDDEN], |_| 1.0);
    for (config, tensor, fragment) in [
        (
            json!({}),
            Some(rows(2)),
            "field 'trainable_token_indices' is not set in adapter_config.json",
        ),
        (
            json!({field: [1, 2]}),
            None,
            "lists tokens of embed_tokens, whose rows are not in the file",
        ),
        (
            json!({field: [1, 2]}),
            Some(rows(3)),
            "it has 3 rows, trainable_token_indices 2 tokens",
        ),
        (json!({field: [2, 2]}), Some(rows(2)), "lists token 2 twice"),
        (
            json!({field: [-1]}),
            Some(rows(1)),
            "expected a list of token ids",
        ),
        (
            json!({field: [1_u64 << 31]}),
            Some(rows(1)),
            "expected a list of token ids",
        ),
        (
            json!({field: {"norm": [1]}}),
            Some(rows(1)),
            "names \"norm\", expected embed_tokens or lm_head",
        ),
        (
            json!({field: [40_000]}),
            Some(rows(1)),
            "it has rows of tokens from 40000 on",
        ),
        (
            json!({field: [1], "modules_to_save": ["lm_head"]}),
            Some(rows(1)),
            "can't be used with embed_tokens or lm_head in modules_to_save",
        ),
        (
            json!({field: [1], "alora_invocation_tokens": [1, 2]}),
            Some(rows(1)),
            "can't be used with embeddings or a head of the adapter's own",
        ),
    ] {
        let mut peft = Peft::new();
        for (field, value) in config.as_object().unwrap() {
            peft.config[field] = value.clone();
        }
        if config.get("modules_to_save").is_some() {
            peft.set(HEAD, Tensor::f32(&SHAPE, value));
        }
        if let Some(tensor) = tensor {
            peft.set(EMBED_TOKENS, tensor);
        }
        peft.write();
        assert_error(check(peft.path(), &UNTIED), fragment);
    }
}
