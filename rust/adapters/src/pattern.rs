//! Regular expressions on module paths, matched the way PEFT does, all of a config within one bound.

use std::cell::Cell;
use std::time::{Duration, Instant};

use fancy_regex::{Regex, RegexBuilder};

use crate::error::{Error, Result};

/// Patterns of one field that are more than a path; a path costs nothing, and there may be one per module.
const MAX_REGEXES: usize = 128;
/// Bytes one compiled pattern may take.
const MAX_COMPILED_NBYTES: usize = 1 << 20;
/// Steps of one match that goes back.
const MAX_STEPS: usize = 100_000;
/// Time of all matches of one field together.
const MAX_TIME: Duration = Duration::from_secs(2);

/// The regular expressions of one field of a config, and the time that matching them has taken.
pub(crate) struct Patterns {
    field: &'static str,
    regexes: Vec<Regex>,
    spent: Cell<Duration>,
}

impl Patterns {
    /// None yet; errors name `field`.
    pub(crate) fn new(field: &'static str) -> Self {
        Self {
            field,
            regexes: Vec::new(),
            spent: Cell::default(),
        }
    }

    /// Compiles `pattern` between `prefix` and `suffix`; its index.
    pub(crate) fn add(&mut self, prefix: &str, pattern: &str, suffix: &str) -> Result<usize> {
        let index = self.regexes.len();
        if index == MAX_REGEXES {
            let reason = format!(
                "has more than {MAX_REGEXES} regular expressions, the limit; name modules by their paths"
            );
            return Err(Error::field(self.field, reason));
        }
        let regex = RegexBuilder::new(&format!("{prefix}{pattern}{suffix}"))
            .backtrack_limit(MAX_STEPS)
            .delegate_size_limit(MAX_COMPILED_NBYTES)
            .delegate_dfa_size_limit(MAX_COMPILED_NBYTES)
            .build()
            .map_err(|error| {
                Error::field(
                    self.field,
                    format!("has the bad pattern '{pattern}': {error}"),
                )
            })?;
        self.regexes.push(regex);
        Ok(index)
    }

    /// Whether the pattern at `index` matches, or an error that says that the patterns are too expensive.
    pub(crate) fn is_match(&self, index: usize, key: &str) -> Result<bool> {
        let started = Instant::now();
        let is_match = self.regexes[index]
            .is_match(key)
            .map_err(|error| Error::field(self.field, format!("can't be matched: {error}")))?;
        self.spent.set(self.spent.get() + started.elapsed());
        if self.spent.get() > MAX_TIME {
            let seconds = MAX_TIME.as_secs();
            let reason = format!("takes over {seconds} s to match, write simpler patterns");
            return Err(Error::field(self.field, reason));
        }
        Ok(is_match)
    }

    /// Whether any of them matches; none that there are not.
    pub(crate) fn any_matches(&self, key: &str) -> Result<bool> {
        for index in 0..self.regexes.len() {
            if self.is_match(index, key)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.regexes.is_empty()
    }
}

/// `rank_pattern` or `alpha_pattern`: the first pattern that matches a module path decides.
pub(crate) struct PatternMap<T> {
    patterns: Patterns,
    entries: Vec<(Matcher, T)>,
}

/// A pattern matches a whole path or the end of one, after a dot.
enum Matcher {
    /// Of letters, digits, "_", "-" and ".", which stands for any character.
    Path(String),
    /// Its index among the patterns.
    Regex(usize),
}

impl<T: Copy> PatternMap<T> {
    pub(crate) fn new<'a>(
        field: &'static str,
        entries: impl IntoIterator<Item = (&'a str, T)>,
    ) -> Result<Self> {
        let mut patterns = Patterns::new(field);
        let mut compiled = Vec::new();
        for (pattern, value) in entries {
            let matcher = if is_path(pattern) {
                Matcher::Path(pattern.into())
            } else {
                Matcher::Regex(patterns.add(r"^(.*\.)?(", pattern, ")$")?)
            };
            compiled.push((matcher, value));
        }
        Ok(Self {
            patterns,
            entries: compiled,
        })
    }

    pub(crate) fn get(&self, key: &str) -> Result<Option<T>> {
        for (matcher, value) in &self.entries {
            let is_match = match matcher {
                Matcher::Path(path) => ends_in_path(key, path),
                Matcher::Regex(index) => self.patterns.is_match(*index, key)?,
            };
            if is_match {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }
}

fn is_path(pattern: &str) -> bool {
    !pattern.is_empty()
        && pattern
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte))
}

/// Whether `key` is `path`, or ends in it after a dot.
fn ends_in_path(key: &str, path: &str) -> bool {
    let mut key = key.chars().rev();
    let is_end = path.chars().rev().all(|expected| {
        key.next()
            .is_some_and(|found| found == expected || (expected == '.' && found != '\n'))
    });
    is_end && key.next().is_none_or(|before| before == '.')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_matches_as_its_regular_expression_does() {
        let keys = [
            "q_proj",
            "self_attn.q_proj",
            "xq_proj",
            "model.layers.1.self_attn.q_proj",
            "model.layers.11.self_attn.q_proj",
            "modelxlayersx1xself_attnxq_proj",
            "q_proj.x",
            "",
            ".q_proj",
        ];
        for path in [
            "q_proj",
            "1.self_attn.q_proj",
            ".q_proj",
            "model.layers.1.self_attn.q_proj",
            "..",
            "-",
        ] {
            assert!(is_path(path));
            let mut patterns = Patterns::new("rank_pattern");
            patterns.add(r"^(.*\.)?(", path, ")$").unwrap();
            for key in keys {
                let expected = patterns.is_match(0, key).unwrap();
                assert_eq!(ends_in_path(key, path), expected, "{path} on {key}");
            }
        }
    }

    #[test]
    fn a_path_per_module_is_fine_and_many_regular_expressions_are_not() {
        let paths: Vec<String> = (0..5000).map(|i| format!("layers.{i}.q_proj")).collect();
        let map =
            PatternMap::new("rank_pattern", paths.iter().map(|path| (path.as_str(), 4))).unwrap();
        assert_eq!(map.get("model.layers.4999.q_proj").unwrap(), Some(4));
        let regexes: Vec<String> = (0..=MAX_REGEXES)
            .map(|i| format!("layers.{i}.(q|v)_proj"))
            .collect();
        let many = |count| {
            let entries = regexes[..count].iter().map(|pattern| (pattern.as_str(), 4));
            PatternMap::new("rank_pattern", entries).map(|_| ())
        };
        many(MAX_REGEXES).unwrap();
        let error = many(MAX_REGEXES + 1).unwrap_err().to_string();
        assert!(
            error.contains("more than 128 regular expressions"),
            "{error}"
        );
    }

    #[test]
    fn a_pattern_that_would_fill_memory_is_refused() {
        let mut patterns = Patterns::new("rank_pattern");
        let error = patterns.add("", "(.{0,99}){0,99}", "").unwrap_err();
        assert!(error.to_string().contains("bad pattern"), "{error}");
    }

    #[test]
    fn a_pattern_that_goes_back_for_ever_is_refused() {
        let mut patterns = Patterns::new("target_modules");
        patterns.add(r"\A(?:", r"(a+)+\1c", r")\z").unwrap();
        let error = patterns
            .is_match(0, &"a".repeat(60))
            .unwrap_err()
            .to_string();
        assert!(error.contains("can't be matched"), "{error}");
    }
}
