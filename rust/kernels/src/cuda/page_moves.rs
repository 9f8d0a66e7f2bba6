//! Moving an extent inside the pool, though its old and its new place may overlap.

/// Cuts a move into copies (src, dst, count of pages) that overlap nothing of their own and, in this
/// order, overwrite nothing that is still to be copied.
pub(super) fn move_parts(src: usize, dst: usize, num_pages: usize) -> Vec<(usize, usize, usize)> {
    let distance = src.abs_diff(dst);
    if distance == 0 {
        return Vec::new();
    }
    let part = |first: usize| {
        let count = distance.min(num_pages - first);
        (src + first, dst + first, count)
    };
    let parts = (0..num_pages).step_by(distance).map(part);
    if dst < src {
        parts.collect()
    } else {
        parts.rev().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_copy_every_page_once_whatever_the_overlap() {
        for num_pages in 0..8 {
            for (src, dst) in [
                (0, 5),
                (5, 0),
                (0, 1),
                (1, 0),
                (3, 3),
                (2, 4),
                (4, 2),
                (0, 8),
            ] {
                let mut pages: Vec<usize> = (0..20).collect();
                for (src, dst, count) in move_parts(src, dst, num_pages) {
                    assert!(
                        count <= src.abs_diff(dst),
                        "a part overlaps its destination"
                    );
                    pages.copy_within(src..src + count, dst);
                }
                let expected: Vec<usize> = (src..src + num_pages).collect();
                assert_eq!(pages[dst..dst + num_pages], expected);
            }
        }
    }
}
