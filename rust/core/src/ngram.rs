//! `NgramIndex`: where in a sequence its last tokens have stood before, to guess what comes next.
//!
//! Places of one token are chained, the latest first, as a compressor chains them (RFC 1951, 4): a token costs one
//! entry, whatever the length of the sequence.
//!
//! Source: prompt lookup decoding, <https://github.com/apoorvumang/prompt-lookup-decoding>.

/// Longer matches are as good as this.
pub const MAX_MATCH: usize = 24;
/// Places looked at of one token.
pub const MAX_PLACES: usize = 64;
const MIN_HEADS: usize = 256;

#[derive(Debug, Clone, Default)]
pub struct NgramIndex {
    /// By a token's hash: one more than its last position, 0 for none. As long as a power of two.
    heads: Vec<u32>,
    /// By position: the same of the one before it with the same hash.
    earlier: Vec<u32>,
}

/// What has followed the longest match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Match {
    /// Position behind it.
    pub next: usize,
    /// Tokens that match, up to `MAX_MATCH`.
    pub len: usize,
}

impl NgramIndex {
    /// Takes in all of `tokens` but the last, which is what is looked up; those of earlier calls are a prefix of them.
    pub fn extend(&mut self, tokens: &[i32]) {
        let end = tokens.len().saturating_sub(1);
        if self.heads.is_empty() {
            self.heads = vec![0; end.next_power_of_two().max(MIN_HEADS)];
        }
        for &token in &tokens[self.earlier.len().min(end)..end] {
            let head = self.head(token);
            self.earlier.push(self.heads[head]);
            self.heads[head] = self.earlier.len() as u32;
        }
    }

    /// Positions behind `token` in `tokens`, which were given to `extend`: the latest first, `MAX_PLACES` of its hash.
    pub fn places<'a>(&'a self, tokens: &'a [i32], token: i32) -> impl Iterator<Item = usize> + 'a {
        let latest = (!self.heads.is_empty()).then(|| self.heads[self.head(token)] as usize);
        let earlier =
            |&next: &usize| Some(self.earlier[next - 1] as usize).filter(|&next| next > 0);
        let places = std::iter::successors(latest.filter(|&next| next > 0), earlier);
        places
            .take(MAX_PLACES)
            .filter(move |&next| tokens[next - 1] == token)
    }

    /// Where in `tokens`, which were given to `extend`, the last tokens of `last` have stood before: the longest match,
    /// the latest of those as long.
    pub fn find(&self, tokens: &[i32], last: &[i32]) -> Option<Match> {
        let mut best: Option<Match> = None;
        for next in self.places(tokens, *last.last()?) {
            let len = match_len(&tokens[..next], last, MAX_MATCH);
            if best.is_none_or(|best| len > best.len) {
                best = Some(Match { next, len });
            }
            if len == MAX_MATCH {
                break;
            }
        }
        best
    }

    /// Fibonacci hashing.
    fn head(&self, token: i32) -> usize {
        let bits = self.heads.len().trailing_zeros();
        (u64::from(token as u32).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - bits)) as usize
    }
}

/// How many of the last tokens of both are the same, `most` at most.
pub fn match_len(tokens: &[i32], last: &[i32], most: usize) -> usize {
    let pairs = tokens.iter().rev().zip(last.iter().rev());
    pairs.take(most).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(tokens: &[i32]) -> Option<(usize, usize)> {
        let mut index = NgramIndex::default();
        for len in 1..=tokens.len() {
            index.extend(&tokens[..len]);
        }
        let found = index.find(tokens, tokens);
        found.map(|found| (found.next, found.len))
    }

    #[test]
    fn longest_match_wins_and_of_equal_ones_the_latest() {
        assert_eq!(find(&[1, 2, 3, 9, 2, 3, 8, 1, 2, 3]), Some((3, 3)));
        assert_eq!(find(&[2, 3, 9, 2, 3, 8, 7, 2, 3]), Some((5, 2)));
    }

    #[test]
    fn what_never_stood_before_is_no_match() {
        assert_eq!(find(&[]), None);
        assert_eq!(find(&[1]), None);
        assert_eq!(find(&[1, 2]), None);
        assert_eq!(find(&[3, 1, 2, 1]), Some((2, 1)));
    }

    #[test]
    fn a_match_may_end_one_token_ago_and_reach_into_itself() {
        assert_eq!(find(&[5, 5, 5]), Some((2, 2)));
        assert_eq!(find(&[1, 2, 1, 2, 1, 2]), Some((4, 4)));
    }

    #[test]
    fn matches_are_those_of_a_search_from_the_end() {
        let mut state = 1_u64;
        let mut tokens = Vec::new();
        for _ in 0..2000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            tokens.push((state >> 33) as i32 % 40);
        }
        let mut index = NgramIndex::default();
        for len in 2..=tokens.len() {
            let tokens = &tokens[..len];
            index.extend(tokens);
            let common = |end: usize| {
                let matches = (0..MAX_MATCH.min(end + 1))
                    .take_while(|i| tokens[end - i] == tokens[len - 1 - i]);
                matches.count()
            };
            let found = index.find(tokens, tokens);
            let places = (0..len - 1).rev().filter(|&end| common(end) > 0);
            // Other tokens of the same hash take some of the candidates.
            let longest = places.take(MAX_PLACES / 2).map(common).max();
            let found_len = found.map(|found| found.len);
            assert!(found_len >= longest, "{found_len:?} of {longest:?}");
            if let Some(found) = found {
                assert_eq!(common(found.next - 1), found.len);
            }
        }
    }
}
