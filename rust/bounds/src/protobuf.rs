//! How many values a protobuf message has, those of the messages in it included.
//!
//! Source: the wire format, protobuf.dev/programming-guides/encoding.

use std::collections::HashMap;

/// What fields of a message hold, by field number; those left out hold text, bytes or one number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape(pub HashMap<u64, Content>);

/// What the bytes of one field are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A message, or an entry of a map.
    Message(Shape),
    /// Packed numbers, each a varint.
    Varints,
}

/// What `count` found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProtobufCounts {
    /// Messages, texts and byte strings: what takes an object each.
    pub objects: usize,
    /// Numbers.
    pub numbers: usize,
}

/// Counts a message's values, and stops once either number is above its limit.
///
/// What is no message is counted as far as it is like one: bytes that can't be gone past end the message they
/// stand in.
pub fn count(data: &[u8], shape: &Shape, limits: ProtobufCounts) -> ProtobufCounts {
    let mut counts = ProtobufCounts::default();
    count_message(data, shape, limits, &mut counts);
    counts
}

fn count_message(
    mut data: &[u8],
    shape: &Shape,
    limits: ProtobufCounts,
    counts: &mut ProtobufCounts,
) {
    while counts.objects <= limits.objects && counts.numbers <= limits.numbers {
        let Some(tag) = take_varint(&mut data) else {
            return;
        };
        let skipped = match tag & 7 {
            0 => take_varint(&mut data).map(|_| ()),
            1 => take(&mut data, 8).map(|_| ()),
            5 => take(&mut data, 4).map(|_| ()),
            3 | 4 => Some(()), // a group begins or ends: its fields are counted with the message's
            2 => {
                let content = take_varint(&mut data).and_then(|len| take(&mut data, len));
                let Some(content) = content else { return };
                match shape.0.get(&(tag >> 3)) {
                    Some(Content::Varints) => {
                        counts.numbers += content.iter().filter(|&&b| b < 0x80).count();
                    }
                    Some(Content::Message(shape)) => {
                        counts.objects += 1;
                        count_message(content, shape, limits, counts);
                    }
                    None => counts.objects += 1,
                }
                continue;
            }
            _ => None,
        };
        if skipped.is_none() {
            return;
        }
        counts.numbers += 1;
    }
}

fn take_varint(data: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for (index, &byte) in data.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f)
            .checked_shl(7 * index as u32)
            .unwrap_or(0);
        if byte < 0x80 {
            *data = &data[index + 1..];
            return Some(value);
        }
    }
    None
}

fn take<'a>(data: &mut &'a [u8], len: u64) -> Option<&'a [u8]> {
    let (taken, rest) = data.split_at_checked(usize::try_from(len).ok()?)?;
    *data = rest;
    Some(taken)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const UNLIMITED: ProtobufCounts = ProtobufCounts {
        objects: usize::MAX,
        numbers: usize::MAX,
    };

    /// Field 1 packed numbers, field 2 a message of the same fields without a field 2.
    fn shape() -> Shape {
        let inner = Shape([(1, Content::Varints)].into());
        Shape([(1, Content::Varints), (2, Content::Message(inner))].into())
    }

    fn counts(data: &[u8]) -> (usize, usize) {
        let found = count(data, &shape(), UNLIMITED);
        (found.objects, found.numbers)
    }

    #[test]
    fn fields_of_every_wire_type_are_counted() {
        assert_eq!(counts(b""), (0, 0));
        assert_eq!(counts(b"\x18\x96\x01"), (0, 1)); // 3: 150
        assert_eq!(counts(b"\x19\0\0\0\0\0\0\0\0\x1d\0\0\0\0"), (0, 2)); // 3: a fixed64, a fixed32
        assert_eq!(counts(b"\x22\x03abc\x22\x00"), (2, 0)); // 4: "abc", ""
        assert_eq!(counts(b"\x0a\x04\x01\x96\x01\x02"), (0, 3)); // 1: [1, 150, 2], packed
        assert_eq!(counts(b"\x08\x01\x08\x02"), (0, 2)); // 1: [1, 2], not packed
    }

    #[test]
    fn messages_are_counted_with_what_is_in_them() {
        assert_eq!(counts(b"\x12\x04\x0a\x02\x01\x02\x12\x00"), (2, 2));
    }

    #[test]
    fn counting_stops_above_a_limit() {
        let data = [0x12, 0].repeat(1000);
        let limits = ProtobufCounts {
            objects: 10,
            numbers: 10,
        };
        assert_eq!(
            count(&data, &shape(), limits),
            ProtobufCounts {
                objects: 11,
                numbers: 0
            }
        );
        assert_eq!(count(&[0x18, 0].repeat(1000), &shape(), limits).numbers, 11);
    }

    #[test]
    fn what_is_cut_short_ends_the_count() {
        assert_eq!(counts(b"\x22\xff\xff\xff\xff\xff\xff\xff\xff\x7f"), (0, 0)); // longer than there is
        assert_eq!(counts(b"\x18\x01\x18\xff"), (0, 1));
        assert_eq!(counts(&[0xff; 32]), (0, 0));
    }

    proptest! {
        #[test]
        fn any_bytes_are_counted(data: Vec<u8>) {
            let found = count(&data, &shape(), UNLIMITED);
            prop_assert!(found.objects + found.numbers <= data.len());
        }
    }
}
