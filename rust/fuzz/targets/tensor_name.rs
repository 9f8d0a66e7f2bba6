//! A tensor's name: PEFT's own is bound to what it spells out, and any other to what it has at its end.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use loraserve_adapters::BaseShape;
use loraserve_fuzz::{base, bounded};

static SHAPE: LazyLock<BaseShape> = LazyLock::new(base);

fuzz_target!(|name: &str| {
    let bound = bounded(|| loraserve_adapters::fuzz::bind_name(name, &SHAPE));
    if let Some((layer, path, rest)) = bound {
        assert!(
            name.contains(&format!("layers.{layer}.")) || name.contains("_mod"),
            "{name}"
        );
        let last = path.rsplit('.').next().unwrap_or_default();
        assert!(name.contains(last), "{name}");
        let (part, end) = rest.split_once('.').unwrap_or((rest, ""));
        let parts = match (part, end) {
            ("lora_A", _) => ["lora_A.", "lora_down."],
            ("lora_B", "weight") => ["lora_B.", "lora_up."],
            _ => [part; 2],
        };
        assert!(
            parts.iter().any(|part| name.contains(part)) && name.ends_with(end),
            "{name}"
        );
        let plain = format!("base_model.model.model.layers.{layer}.{path}.{rest}");
        let again = loraserve_adapters::fuzz::bind_name(&plain, &SHAPE);
        assert_eq!(again, Some((layer, path, rest)), "{name}");
    }
});
