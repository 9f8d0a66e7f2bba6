//! The beginning of a file that is no adapter's: what it is, in words, or nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loraserve_adapters::{Expected, recognise};
use loraserve_fuzz::bounded;

fuzz_target!(|data: &[u8]| {
    for expected in [Expected::Binary, Expected::Json] {
        let what = bounded(|| recognise(data, expected));
        assert!(what.is_none_or(|what| what.len() < 1000 && !what.contains('\n')));
    }
});
