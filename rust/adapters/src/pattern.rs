//! Regular expressions on module paths, matched the way PEFT does.

use fancy_regex::Regex;

use crate::error::{Error, Result};

/// Compiles `pattern` between `prefix` and `suffix`; `field` is named if it can't be.
pub(crate) fn compile(field: &str, prefix: &str, pattern: &str, suffix: &str) -> Result<Regex> {
    Regex::new(&format!("{prefix}{pattern}{suffix}"))
        .map_err(|error| Error::field(field, format!("has the bad pattern '{pattern}': {error}")))
}

/// Matches, or says that the pattern of `field` is too expensive.
pub(crate) fn is_match(field: &str, regex: &Regex, key: &str) -> Result<bool> {
    regex
        .is_match(key)
        .map_err(|error| Error::field(field, format!("can't be matched: {error}")))
}

/// `rank_pattern` or `alpha_pattern`: the first pattern that matches a module path decides.
pub(crate) struct PatternMap<T> {
    field: &'static str,
    entries: Vec<(Regex, T)>,
}

impl<T: Copy> PatternMap<T> {
    /// A pattern matches a whole path or the end of one, after a dot.
    pub(crate) fn new<'a>(
        field: &'static str,
        entries: impl IntoIterator<Item = (&'a str, T)>,
    ) -> Result<Self> {
        let compiled = entries
            .into_iter()
            .map(|(pattern, value)| Ok((compile(field, r"^(.*\.)?(", pattern, ")$")?, value)));
        Ok(Self {
            field,
            entries: compiled.collect::<Result<_>>()?,
        })
    }

    pub(crate) fn get(&self, key: &str) -> Result<Option<T>> {
        for (regex, value) in &self.entries {
            if is_match(self.field, regex, key)? {
                return Ok(Some(*value));
            }
        }
        Ok(None)
    }
}
