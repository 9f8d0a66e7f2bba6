//! `LoRA` on the embedding and on the head.

use super::*;

const RANK: usize = 3;
const TOKENS: usize = 40;
const EMBEDDING_A: &str = "base_model.model.model.embed_tokens.lora_embedding_A";
const EMBEDDING_B: &str = "base_model.model.model.embed_tokens.lora_embedding_B";
const HEAD_A: &str = "base_model.model.lm_head.lora_A.weight";
const HEAD_B: &str = "base_model.model.lm_head.lora_B.weight";

fn shape() -> BaseShape {
    BaseShape {
        tokens: Some([TOKENS, HIDDEN]),
        ..base()
    }
}

fn number(index: usize) -> f32 {
    index as f32 - 7.0
}

/// `LoRA` on both, beside that of the layers.
fn on_both() -> Peft {
    let mut peft = Peft::new();
    let targets = peft.config["target_modules"].as_array().unwrap().clone();
    let both = [json!("embed_tokens"), json!("lm_head")];
    peft.config["target_modules"] = targets.into_iter().chain(both).collect();
    peft.config["rank_pattern"] = json!({"embed_tokens": RANK, "lm_head": RANK});
    peft.config["alpha_pattern"] = json!({"model.embed_tokens": 6, "lm_head": 12});
    for (name, rows, columns) in [
        (EMBEDDING_A, RANK, TOKENS),
        (EMBEDDING_B, HIDDEN, RANK),
        (HEAD_A, RANK, HIDDEN),
        (HEAD_B, TOKENS, RANK),
    ] {
        peft.set(name, Tensor::f32(&[rows, columns], number));
    }
    peft
}

fn check_on(peft: &Peft, shape: &BaseShape) -> Result<Receipt> {
    peft.write();
    check_paced(
        Place::Directory(peft.path()),
        shape,
        LIMITS,
        Some(&UNTIED),
        &Pace::default(),
    )
}

fn matrix(extent: &[u8], offset: usize, panels: Panels, rows: usize) -> Vec<f32> {
    let element = |row, k| {
        let start = offset + 4 * panels.index(row, k);
        f32::from_le_bytes(extent[start..start + 4].try_into().unwrap())
    };
    let row = |row| (0..panels.k).map(move |k| element(row, k));
    (0..rows).flat_map(row).collect()
}

#[test]
fn lora_on_both_is_packed_in_panels() {
    let peft = on_both();
    let receipt = check_on(&peft, &shape()).unwrap();
    let plain = check_on(&Peft::new(), &shape()).unwrap();
    assert_eq!(receipt.tensors, plain.tensors + 4);
    assert_eq!(receipt.modules.first().unwrap(), "embed_tokens");
    assert_eq!(receipt.modules.last().unwrap(), "lm_head");
    assert!(receipt.ranks.contains(&RANK));
    assert!(receipt.changes_tables && !plain.changes_tables);
    assert_eq!(receipt.alone, None);
    let mut extent = vec![1; receipt.nbytes];
    let layout =
        loraserve_adapters::load(peft.path(), &shape(), LIMITS, &receipt.hash, &mut extent);
    let layout = layout.unwrap();
    let dtype = StorageDtype::Float32;
    let numbers = |count: usize| (0..count).map(number).collect::<Vec<_>>();
    let embedding = layout.embedding_lora.unwrap();
    assert_eq!((embedding.rank, embedding.num_tokens), (RANK, TOKENS));
    assert!((embedding.scale - 2.0).abs() < 1e-6);
    let a = matrix(&extent, embedding.a_offset, embedding.a_panels(dtype), RANK);
    assert_eq!(a, numbers(RANK * TOKENS));
    let b = matrix(
        &extent,
        embedding.b_offset,
        embedding.b_panels(dtype),
        HIDDEN,
    );
    assert_eq!(b, numbers(HIDDEN * RANK));
    let head = layout.group(layout.num_layers(), 0).unwrap();
    let module = &head.modules[0];
    assert!((module.scale - 4.0).abs() < 1e-6);
    let a = matrix(&extent, head.a_offset, head.a_panels(dtype), RANK);
    assert_eq!(a, numbers(RANK * HIDDEN));
    let b = matrix(
        &extent,
        module.b_offset,
        module.b_panels(head.panel_dtype(dtype)),
        TOKENS,
    );
    let padded = b.chunks(module.rank).flat_map(|row| &row[..RANK]);
    assert_eq!(padded.copied().collect::<Vec<_>>(), numbers(TOKENS * RANK));
}

type Change = Box<dyn Fn(&mut Peft)>;

#[test]
fn lora_that_does_not_fit_is_refused() {
    let cases: Vec<(Change, &str)> = vec![
        (Box::new(|p| p.drop(HEAD_B)), "has no matching other half"),
        (
            Box::new(|p| p.set(HEAD_B, Tensor::f32(&[TOKENS + 1, RANK], number))),
            "LoRA on an embedding or a head with other tokens than the base's",
        ),
        (
            Box::new(|p| p.set(EMBEDDING_B, Tensor::f32(&[HIDDEN, RANK + 1], number))),
            "embed_tokens: lora_A has rank 3, lora_B has rank 4",
        ),
        (
            Box::new(|p| p.config["rank_pattern"] = json!({"lm_head": RANK})),
            "model.embed_tokens: rank 3 in the tensors, 4 in adapter_config.json",
        ),
        (
            Box::new(|p| {
                p.drop(HEAD_A);
                p.drop(HEAD_B);
            }),
            "lm_head is targeted by adapter_config.json and has no tensors",
        ),
        (
            Box::new(|p| p.config["exclude_modules"] = json!(["lm_head"])),
            "belongs to a module that adapter_config.json does not target",
        ),
        (
            Box::new(|p| p.config["alora_invocation_tokens"] = json!([1, 2])),
            "can't be used with embed_tokens in target_modules",
        ),
        (
            Box::new(|p| {
                let name = "base_model.model.lm_head.lora_magnitude_vector";
                p.set(name, Tensor::f32(&[TOKENS], |_| 1.0));
            }),
            "DoRA or lora_bias on lm_head",
        ),
        (
            Box::new(|p| {
                let name = "base_model.model.lm_head.base_layer.weight";
                p.set(name, with_rows(&[3], 0.5));
            }),
            "LoRA on a head that has rows of its own",
        ),
    ];
    for (change, fragment) in cases {
        let mut peft = on_both();
        change(&mut peft);
        assert_error(check_on(&peft, &shape()), fragment);
    }
    assert_error(
        check_on(&on_both(), &base()),
        "no embedding and head that are known",
    );
}

#[test]
fn all_linear_modules_are_all_but_the_head() {
    let mut peft = on_both();
    peft.config["target_modules"] = json!("all-linear");
    assert_error(check_on(&peft, &shape()), "does not target");
}
