//! Embeddings and heads that can't be taken.

use super::*;

#[test]
fn a_table_that_does_not_fit_is_refused() {
    for (tensor, fragment) in [
        (
            Tensor::f32(&[40_002, 16], value),
            "it has a row of token 40000, for which neither the base nor the adapter has an embedding",
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
            json!({field: [44_096]}),
            Some(rows(1)),
            "it has a row of token 44096, the base has 40000 tokens",
        ),
        (
            json!({field: {"lm_head": [1]}, "modules_to_save": ["lm_head"]}),
            None,
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
        if config[field].get("lm_head").is_some() {
            peft.set(HEAD_TOKENS, rows(1));
        }
        if let Some(tensor) = tensor {
            peft.set(EMBED_TOKENS, tensor);
        }
        peft.write();
        assert_error(check(peft.path(), &UNTIED), fragment);
    }
}

#[test]
fn tokens_beside_a_saved_head_are_refused_where_both_are_one_weight() {
    let mut peft = Peft::new();
    peft.config["trainable_token_indices"] = json!([1]);
    peft.config["modules_to_save"] = json!(["lm_head"]);
    peft.set(HEAD, Tensor::f32(&SHAPE, value));
    peft.set(EMBED_TOKENS, Tensor::f32(&[1, HIDDEN], |_| 1.0));
    peft.write();
    check(peft.path(), &UNTIED).unwrap();
    let fragment = "can't be used with embed_tokens or lm_head in modules_to_save";
    assert_error(check(peft.path(), &TIED), fragment);
}

#[test]
fn two_tensors_of_one_weight_must_agree() {
    let mut peft = Peft::new();
    peft.set(EMBED, Tensor::f32(&[40_002, HIDDEN], value));
    peft.set(HEAD, Tensor::f32(&SHAPE, value));
    peft.write();
    let fragment = "its shape is [40000, 16], that of base_model.model.model.embed_tokens.weight is [40002, 16]";
    assert_error(check(peft.path(), &TIED), fragment);
    check(peft.path(), &UNTIED).unwrap();
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
