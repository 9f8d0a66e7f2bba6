//! Heads to classify with that are saved in the file.

use super::*;

const WEIGHT: &str = "base_model.model.score.weight";
const BIAS: &str = "base_model.model.score.bias";

fn with_head(num_labels: usize) -> Peft {
    let mut peft = Peft::new();
    peft.set(
        WEIGHT,
        Tensor::f32(&[num_labels, HIDDEN], |index| index as f32 - 7.0),
    );
    peft.config["modules_to_save"] = json!(["classifier", "score"]);
    peft.config["task_type"] = json!("SEQ_CLS");
    peft
}

#[test]
fn head_is_read_as_float32_and_is_no_part_of_the_extent() {
    let plain = Peft::new();
    plain.write();
    let plain = check(plain.path(), &UNTIED).unwrap();
    let mut peft = with_head(3);
    peft.set(BIAS, Tensor::f32(&[3], |index| index as f32));
    peft.write();
    let receipt = check(peft.path(), &UNTIED).unwrap();
    let head = receipt.head.as_ref().unwrap();
    assert_eq!(
        (head.module, head.num_labels, head.num_features),
        ("score", 3, HIDDEN)
    );
    let values = |bytes: &[u8]| -> Vec<f32> {
        let values = bytes.as_chunks().0.iter();
        values.map(|value| f32::from_le_bytes(*value)).collect()
    };
    let expected: Vec<f32> = (0..3 * HIDDEN).map(|index| index as f32 - 7.0).collect();
    assert_eq!(values(&head.weight), expected);
    assert_eq!(values(head.bias.as_ref().unwrap()), [0.0, 1.0, 2.0]);
    assert_eq!(head.nbytes(), 4 * (3 * HIDDEN + 3));
    assert_eq!(receipt.nbytes, plain.nbytes);
    assert_eq!(receipt.tensors, plain.tensors + 2);
    assert!(!receipt.changes_tables && receipt.alone.is_none());
    assert_eq!(receipt.task_type.as_deref(), Some("SEQ_CLS"));
    assert_eq!(
        receipt.notes,
        ["score: a head to classify with, of 3 labels"]
    );
    load(peft.path(), &UNTIED, &receipt);
}

#[test]
fn heads_are_part_of_what_an_adapter_is() {
    let hash = |change: &dyn Fn(&mut Peft)| {
        let mut peft = with_head(2);
        change(&mut peft);
        peft.write();
        check(peft.path(), &UNTIED).unwrap().hash
    };
    let hashes = [
        hash(&|_| {}),
        hash(&|p| p.set(WEIGHT, Tensor::f32(&[2, HIDDEN], |_| 1.0))),
        hash(&|p| p.set(WEIGHT, Tensor::f32(&[3, HIDDEN], |_| 1.0))),
        hash(&|p| p.set(BIAS, Tensor::f32(&[2], |_| 0.0))),
    ];
    let distinct: std::collections::BTreeSet<_> = hashes.iter().collect();
    assert_eq!(distinct.len(), hashes.len());
}

type Change = Box<dyn Fn(&mut Peft)>;

#[test]
fn heads_that_can_not_be_served_are_refused() {
    let cases: Vec<(Change, &str)> = vec![
        (
            Box::new(|p| p.set(WEIGHT, Tensor::f32(&[2, HIDDEN + 1], |_| 1.0))),
            "it reads 17 features, the model has 16",
        ),
        (
            Box::new(|p| p.set(WEIGHT, Tensor::f32(&[2 * HIDDEN], |_| 1.0))),
            "expected two dimensions",
        ),
        (
            Box::new(|p| p.set(WEIGHT, Tensor::f32(&[0, HIDDEN], |_| 1.0))),
            "it has 0 labels, served are from 1 to 65536",
        ),
        (
            Box::new(|p| p.set(WEIGHT, Tensor::f32(&[65537, HIDDEN], |_| 1.0))),
            "it has 65537 labels",
        ),
        (
            Box::new(|p| p.set(WEIGHT, Tensor::f32(&[2, HIDDEN], |_| f32::NAN))),
            "holds NaN at element 0",
        ),
        (
            Box::new(|p| p.set(BIAS, Tensor::f32(&[3], |_| 1.0))),
            "expected one number for each of 2 columns",
        ),
        (
            Box::new(|p| {
                p.set(BIAS, Tensor::f32(&[2], |_| 1.0));
                p.drop(WEIGHT);
            }),
            "its weight is not in the file",
        ),
        (
            Box::new(|p| {
                let other = "base_model.model.classifier.weight";
                p.set(other, Tensor::f32(&[2, HIDDEN], |_| 1.0));
            }),
            "the file has base_model.model.score.weight too",
        ),
        (
            Box::new(|p| p.drop(WEIGHT)),
            "lists \"classifier\", whose weight is not in the file",
        ),
        (
            Box::new(|p| p.config["task_type"] = json!("TOKEN_CLS")),
            "served are heads of whole texts",
        ),
    ];
    for (change, fragment) in cases {
        let mut peft = with_head(2);
        change(&mut peft);
        peft.write();
        assert_error(check(peft.path(), &UNTIED), fragment);
    }
}
