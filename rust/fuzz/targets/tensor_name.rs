//! A tensor's name: PEFT's own is bound to what it spells out, and any other to what it has at its end.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use loraserve_adapters::BaseShape;
use loraserve_fuzz::{base, bounded};

static SHAPE: LazyLock<BaseShape> = LazyLock::new(base);

fuzz_target!(|name: &str| {
    let bound = bounded(|| loraserve_adapters::fuzz::bind_name(name, &SHAPE));
    if let Some((layer, path, half)) = bound {
        assert!(name.contains(&format!("layers.{layer}.")) || name.contains("_mod"), "{name}");
        let last = path.rsplit('.').next().unwrap_or_default();
        assert!(name.contains(last), "{name}");
        let halves = if half == "A" { ["lora_A.", "lora_down."] } else { ["lora_B.", "lora_up."] };
        assert!(halves.iter().any(|half| name.contains(half)) && name.ends_with(".weight"), "{name}");
        let plain = format!("base_model.model.model.layers.{layer}.{path}.lora_{half}.weight");
        let again = loraserve_adapters::fuzz::bind_name(&plain, &SHAPE);
        assert_eq!(again, Some((layer, path, half)), "{name}");
    }
});
