//! A tensor's name: what it is bound to, spelt out again, is that name.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use loraserve_adapters::BaseShape;
use loraserve_fuzz::{base, bounded};

static SHAPE: LazyLock<BaseShape> = LazyLock::new(base);

fuzz_target!(|name: &str| {
    let bound = bounded(|| loraserve_adapters::fuzz::bind_name(name, &SHAPE));
    if let Some((layer, path, half)) = bound {
        let prefix = format!("base_model.model.model.layers.{layer}.{path}.lora_{half}.");
        let rest = name
            .strip_prefix(&prefix)
            .expect("a name begins with what it is bound to");
        assert!(rest == "weight" || rest == "default.weight", "{name}");
    }
});
