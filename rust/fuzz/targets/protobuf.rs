//! Bytes of a gRPC message: no more values than bytes, and none counted beyond a limit but the one above it.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use loraserve_bounds::protobuf::{Content, ProtobufCounts, Shape, count};
use loraserve_fuzz::bounded;

const UNLIMITED: ProtobufCounts = ProtobufCounts {
    objects: usize::MAX,
    numbers: usize::MAX,
};
const LIMIT: usize = 16;

/// Three messages within one another; field 1 of each has packed numbers.
static SHAPE: LazyLock<Shape> = LazyLock::new(|| {
    let innermost = Shape([(1, Content::Varints)].into());
    let inner = Shape([(1, Content::Varints), (2, Content::Message(innermost))].into());
    Shape(
        [
            (1, Content::Varints),
            (2, Content::Message(inner.clone())),
            (3, Content::Message(inner)),
        ]
        .into(),
    )
});

fuzz_target!(|data: &[u8]| {
    let all = bounded(|| count(data, &SHAPE, UNLIMITED));
    assert!(all.objects + all.numbers <= data.len());
    let limits = ProtobufCounts {
        objects: LIMIT,
        numbers: LIMIT,
    };
    let some = count(data, &SHAPE, limits);
    assert!(some.objects <= LIMIT + 1);
    let is_refused = some.objects > LIMIT || some.numbers > LIMIT;
    assert_eq!(is_refused, all.objects > LIMIT || all.numbers > LIMIT);
});
