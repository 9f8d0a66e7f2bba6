//! Entries of a `rank_pattern`, one a line, then module paths that they are matched with.
#![no_main]

use libfuzzer_sys::fuzz_target;
use loraserve_fuzz::{bounded, parts};

fuzz_target!(|data: &[u8]| {
    let mut texts = parts(data).filter_map(|part| str::from_utf8(part).ok());
    let (patterns, keys) = (
        texts.next().unwrap_or_default(),
        texts.next().unwrap_or_default(),
    );
    bounded(|| {
        // Refused is as good as matched.
        let _ = loraserve_adapters::fuzz::match_patterns(patterns.lines(), keys.lines());
    });
});
