//! How many values a JSON text has.

/// What `count` found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JsonCounts {
    /// Objects and arrays.
    pub containers: usize,
    /// Commas between values.
    pub commas: usize,
    /// Of the innermost container.
    pub depth: usize,
}

/// Counts a text; what is no JSON is counted as far as it is like it.
pub fn count(data: &[u8]) -> JsonCounts {
    let (mut counts, mut depth) = (JsonCounts::default(), 0_usize);
    let mut position = 0;
    while let Some(&byte) = data.get(position) {
        position += 1;
        match byte {
            b'"' => position = end_of_string(data, position),
            b'{' | b'[' => {
                counts.containers += 1;
                depth += 1;
                counts.depth = counts.depth.max(depth);
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b',' => counts.commas += 1,
            _ => {}
        }
    }
    counts
}

/// The position behind the string whose text begins at `position`.
fn end_of_string(data: &[u8], mut position: usize) -> usize {
    while let Some(&byte) = data.get(position) {
        position += match byte {
            b'"' => return position + 1,
            b'\\' => 2,
            _ => 1,
        };
    }
    data.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(text: &str) -> (usize, usize, usize) {
        let JsonCounts {
            containers,
            commas,
            depth,
        } = count(text.as_bytes());
        (containers, commas, depth)
    }

    #[test]
    fn containers_commas_and_depth_are_counted() {
        assert_eq!(counts(""), (0, 0, 0));
        assert_eq!(counts(r#"{"a": [1, 2, {}], "b": null}"#), (3, 3, 3));
        assert_eq!(counts("[[], []]"), (3, 1, 2));
    }

    #[test]
    fn what_stands_in_strings_does_not_count() {
        assert_eq!(counts(r#"["{[,", "\"[", "\\"]"#), (1, 2, 1));
        assert_eq!(counts(r#"["never closed [,"#), (1, 0, 1));
        assert_eq!(counts(r#"["\"#), (1, 0, 1));
    }

    #[test]
    fn closing_what_was_not_opened_is_no_depth() {
        assert_eq!(counts("]]]]{"), (1, 0, 1));
    }
}
