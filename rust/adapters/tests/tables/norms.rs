//! Norms of an adapter's own.

use super::*;

const BEFORE_MLP: &str = "base_model.model.model.layers.1.post_attention_layernorm.weight";
const LAST: &str = "base_model.model.model.norm.weight";

fn with_norms(names: &[&str]) -> Peft {
    let mut peft = Peft::new();
    for name in names {
        peft.set(name, Tensor::f32(&[HIDDEN], |index| index as f32 + 1.0));
    }
    peft
}

#[test]
fn norms_are_packed_under_the_order_in_which_they_run() {
    let mut peft = with_norms(&[BEFORE_MLP, LAST]);
    let saved = ["layers.1.post_attention_layernorm", "model.norm"];
    peft.config["modules_to_save"] = json!(saved);
    peft.write();
    let receipt = check(peft.path(), &UNTIED).unwrap();
    assert_eq!(receipt.notes, ["norms: 2 in place of the base's"]);
    assert!(receipt.alone.unwrap().contains("norms") && receipt.changes_tables);
    let (layout, extent) = load(peft.path(), &UNTIED, &receipt);
    let indices: Vec<_> = layout.norms.iter().map(|norm| norm.index).collect();
    assert_eq!(indices, [3, 4]);
    for norm in &layout.norms {
        let bytes = &extent[norm.offset..][..4 * HIDDEN];
        let values = bytes
            .as_chunks()
            .0
            .iter()
            .map(|value| f32::from_le_bytes(*value));
        let expected: Vec<f32> = (1..=HIDDEN).map(|value| value as f32).collect();
        assert_eq!(values.collect::<Vec<_>>(), expected);
    }
    assert_eq!(layout.norm(2), None);
}

#[test]
fn norms_are_part_of_what_an_adapter_is() {
    let hash = |names: &[&str]| {
        let peft = with_norms(names);
        peft.write();
        check(peft.path(), &UNTIED).unwrap().hash
    };
    let hashes = [
        hash(&[]),
        hash(&[LAST]),
        hash(&[BEFORE_MLP]),
        hash(&[BEFORE_MLP, LAST]),
    ];
    let distinct: std::collections::BTreeSet<_> = hashes.iter().collect();
    assert_eq!(distinct.len(), hashes.len());
}

type Change = Box<dyn Fn(&mut Peft)>;

#[test]
fn norms_that_do_not_fit_are_refused() {
    let cases: Vec<(Change, &str)> = vec![
        (
            Box::new(|p| p.config["modules_to_save"] = json!(["norm"])),
            "lists \"norm\", and the weight of model.layers.0.input_layernorm is not in the file",
        ),
        (
            Box::new(|p| p.set(LAST, Tensor::f32(&[HIDDEN + 1], |_| 1.0))),
            "expected one number for each of 16 columns",
        ),
        (
            Box::new(|p| p.set(LAST, Tensor::f32(&[HIDDEN], |_| f32::NAN))),
            "holds NaN at element 0",
        ),
        (
            Box::new(|p| p.config["alora_invocation_tokens"] = json!([1, 2])),
            "can't be used with norms of the adapter's own",
        ),
        (
            Box::new(|p| p.config["modules_to_save"] = json!(["q_norm"])),
            "only embed_tokens, lm_head, norms, score and classifier may be listed",
        ),
    ];
    for (change, fragment) in cases {
        let mut peft = with_norms(&[LAST]);
        change(&mut peft);
        peft.write();
        assert_error(check(peft.path(), &UNTIED), fragment);
    }
}
