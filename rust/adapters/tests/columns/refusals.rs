//! How parts of `DoRA`, `lora_bias` and trained biases are refused.

use super::*;

#[test]
fn parts_that_miss_or_contradict_the_config_are_refused() {
    let magnitude = format!("{Q}.lora_magnitude_vector");
    let b_bias = format!("{Q}.lora_B.bias");
    let wrapped = format!("{Q}.base_layer.bias");
    let cases: Vec<(Peft, Change, String)> = vec![
        (
            dora(),
            Box::new(|p| p.drop(&format!("{Q}.lora_magnitude_vector"))),
            format!("tensor {magnitude} is not in the file, but field 'use_dora' is true"),
        ),
        (
            dora(),
            Box::new(|p| p.config["use_dora"] = json!(false)),
            "lora_magnitude_vector is in the file, but field 'use_dora' is false".into(),
        ),
        (
            dora(),
            Box::new(|p| p.set(&format!("{K}.lora_magnitude_vector"), vector(8, |_| 1.0))),
            format!("tensor {K}.lora_magnitude_vector has no matching lora_A"),
        ),
        (
            with_lora_bias(),
            Box::new(|p| p.drop(&format!("{Q}.lora_B.bias"))),
            format!("tensor {b_bias} is not in the file, but field 'lora_bias' is true"),
        ),
        (
            with_lora_bias(),
            Box::new(|p| p.config["lora_bias"] = json!(false)),
            "lora_B.bias is in the file, but field 'lora_bias' is false".into(),
        ),
        (
            with_bias("none", &wrapped, 16),
            Box::new(|_| {}),
            format!("tensor {wrapped} is in the file, but field 'bias' is none"),
        ),
        (
            with_bias("lora_only", &format!("{K}.bias"), 8),
            Box::new(|_| {}),
            "but field 'bias' is lora_only".into(),
        ),
        (
            with_bias("all", &format!("{Q}.bias"), 16),
            Box::new(|_| {}),
            format!("targets its module: rename it to {wrapped}"),
        ),
        (
            with_bias("all", &format!("{K}.base_layer.bias"), 8),
            Box::new(|_| {}),
            format!("does not target its module: rename it to {K}.bias"),
        ),
        (
            with_bias(
                "all",
                "base_model.model.model.layers.0.self_attn.o_proj.bias",
                16,
            ),
            Box::new(|_| {}),
            "o_proj.bias is a bias where the base model has none".into(),
        ),
    ];
    for (mut peft, damage, fragment) in cases {
        damage(&mut peft);
        assert_error(check_biased(&peft), &fragment);
    }
}

#[test]
fn bad_vectors_are_refused_by_name() {
    let name = format!("{Q}.lora_magnitude_vector");
    let cases: [(Tensor, &str); 8] = [
        (
            vector(17, |_| 1.0),
            "has shape [17], expected one number for each of 16 columns",
        ),
        (Tensor::f32(&[16, 1], |_| 1.0), "has shape [16, 1]"),
        (
            Tensor::f32(&[0], |_| 1.0),
            "stage3_gather_16bit_weights_on_model_save",
        ),
        (
            vector(16, |i| if i == 3 { 0.0 } else { 1.0 }),
            "holds 0 at element 3",
        ),
        (
            vector(16, |i| 2.5 - i as f32),
            "holds -0.5 at element 3, a DoRA magnitude is a length",
        ),
        (
            vector(16, |i| if i == 2 { f32::NAN } else { 1.0 }),
            "holds NaN at element 2",
        ),
        (vector(16, |_| f32::INFINITY), "holds inf at element 0"),
        (
            Tensor {
                dtype: safetensors::Dtype::F64,
                shape: vec![16],
                bytes: vec![0; 128],
            },
            "has dtype F64",
        ),
    ];
    for (tensor, fragment) in cases {
        let mut peft = dora();
        peft.set(&name, tensor);
        assert_error(check_biased(&peft), &format!("tensor {name}"));
        assert_error(check_biased(&peft), fragment);
    }
    for (name, mut peft) in [
        (format!("{Q}.lora_B.bias"), with_lora_bias()),
        (
            format!("{K}.bias"),
            with_bias("all", &format!("{K}.bias"), 8),
        ),
    ] {
        peft.set(&name, vector(3, |_| 1.0));
        assert_error(check_biased(&peft), &format!("tensor {name} has shape [3]"));
    }
}

/// What is done to an adapter that was well.
type Change = Box<dyn Fn(&mut Peft)>;

/// A base whose rows the delta takes back, and one that is gone.
struct Vanishing(Option<f32>);

impl BaseLinears for Vanishing {
    fn row_norms(&self, delta: &Delta<'_>) -> std::result::Result<Vec<f32>, String> {
        let norm = self.0.ok_or("the model was released")?;
        Ok(vec![norm; delta.rows.len()])
    }

    fn rows_per_call(&self, _: usize, _: usize) -> usize {
        0
    }

    fn bias(&self, _: usize, _: usize, _: Range<usize>) -> std::result::Result<Vec<f32>, String> {
        unreachable!("no linear of this base has a bias")
    }
}

#[test]
fn a_load_without_a_finite_gain_or_without_the_base_fails_by_name() {
    let peft = dora();
    let receipt = peft.check().unwrap();
    let load = |base: Option<&dyn BaseLinears>| {
        let mut extent = vec![0; receipt.nbytes];
        let (shape, pace) = (common::base(), Pace::default());
        let loaded = load_paced(
            Place::Directory(peft.path()),
            &shape,
            LIMITS,
            registered(&receipt),
            &mut extent,
            on(base),
            &pace,
        );
        loaded.err().unwrap()
    };
    let zero = load(Some(&Vanishing(Some(0.0))));
    assert_eq!(zero.kind(), ErrorKind::Format);
    assert!(zero.to_string().contains(&format!(
        "tensor {Q}.lora_magnitude_vector holds 1 at element 0, which over the length 0"
    )));
    for (base, reason) in [
        (Some(&Vanishing(None)), "the model was released"),
        (None, "no model"),
    ] {
        let error = load(base.map(|base| base as &dyn BaseLinears));
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains(reason), "{error}");
    }
}
