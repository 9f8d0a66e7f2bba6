//! Bytes of a body: what is JSON has as many values as are counted, what is none no more than bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loraserve_bounds::json::{JsonCounts, count};
use loraserve_fuzz::bounded;
use serde_json::Value;

fuzz_target!(|data: &[u8]| {
    let counts = bounded(|| count(data));
    assert!(counts.containers + counts.commas <= data.len());
    assert!(counts.depth <= counts.containers);
    if let Ok(value) = serde_json::from_slice::<Value>(data) {
        // Written anew: of keys given twice the value has one.
        let text = serde_json::to_vec(&value).expect("a value is JSON");
        assert_eq!(count(&text), counts_of(&value));
    }
});

fn counts_of(value: &Value) -> JsonCounts {
    let inner: Vec<&Value> = match value {
        Value::Array(values) => values.iter().collect(),
        Value::Object(fields) => fields.values().collect(),
        _ => return JsonCounts::default(),
    };
    let mut counts = JsonCounts {
        containers: 1,
        commas: inner.len().saturating_sub(1),
        depth: 0,
    };
    for value in inner {
        let of_value = counts_of(value);
        counts.containers += of_value.containers;
        counts.commas += of_value.commas;
        counts.depth = counts.depth.max(of_value.depth);
    }
    counts.depth += 1;
    counts
}
