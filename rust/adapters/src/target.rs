//! Which modules the config says are adapted, resolved the way PEFT does.

use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::pattern::Patterns;

/// `target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern` together.
pub(crate) struct Targets {
    /// `None` when the config does not say: then the tensors do.
    selector: Option<Selector>,
    exclude: Option<Selector>,
    layers: Layers,
    /// Given as "all-linear", which to PEFT are all but the head.
    is_all_linear: bool,
}

enum Selector {
    /// One, which matches a whole path.
    Pattern(Patterns),
    /// Whole paths, or ends of paths after a dot.
    Names(Vec<String>),
}

/// Restricts `Selector::Names`; `layers` empty means no restriction.
struct Layers {
    layers: Vec<i64>,
    /// Names of the layer list (`layers`); empty means any.
    patterns: Patterns,
}

impl Targets {
    pub(crate) fn new(fields: &Fields) -> Result<Self> {
        let targets = Self {
            selector: Selector::new(fields, "target_modules")?,
            exclude: Selector::new(fields, "exclude_modules")?,
            layers: Layers::new(fields)?,
            is_all_linear: fields
                .string("target_modules")
                .is_some_and(|text| text.eq_ignore_ascii_case("all-linear")),
        };
        let by_pattern = matches!(targets.selector, Some(Selector::Pattern(_)));
        if by_pattern && !targets.layers.layers.is_empty() {
            let reason = "can't be used when 'target_modules' is a string";
            return Err(Error::field("layers_to_transform", reason));
        }
        Ok(targets)
    }

    /// Whether the module at `key` (`model.layers.0.self_attn.q_proj`) is adapted, if stated.
    pub(crate) fn contains(&self, key: &str, layer: usize) -> Result<Option<bool>> {
        let Some(selector) = &self.selector else {
            return Ok(None);
        };
        if self.excludes(key)? {
            return Ok(Some(false));
        }
        let selected = match selector {
            Selector::Pattern(pattern) => pattern.any_matches(key)?,
            Selector::Names(names) if names.iter().any(|name| name == key) => true,
            Selector::Names(names) => {
                ends_with_any(key, names) && self.layers.contain(key, layer)?
            }
        };
        Ok(Some(selected))
    }

    /// Whether the embedding or the head at `key` is adapted, if stated.
    pub(crate) fn contains_token_module(&self, key: &str, no_layer: usize) -> Result<Option<bool>> {
        if self.is_all_linear {
            return Ok(Some(false));
        }
        self.contains(key, no_layer)
    }

    fn excludes(&self, key: &str) -> Result<bool> {
        match &self.exclude {
            None => Ok(false),
            Some(Selector::Pattern(pattern)) => pattern.any_matches(key),
            Some(Selector::Names(names)) => Ok(ends_with_any(key, names)),
        }
    }
}

impl Selector {
    fn new(fields: &Fields, field: &'static str) -> Result<Option<Self>> {
        let selector = match fields.string(field) {
            Some(pattern) => {
                let all = field == "target_modules" && pattern.eq_ignore_ascii_case("all-linear");
                let pattern = if all { ".*" } else { pattern };
                let mut patterns = Patterns::new(field);
                patterns.add(r"\A(?:", pattern, r")\z")?;
                Self::Pattern(patterns)
            }
            None => Self::Names(
                fields
                    .strings(field)?
                    .into_iter()
                    .map(String::from)
                    .collect(),
            ),
        };
        Ok(match selector {
            Self::Names(names) if names.is_empty() => None,
            selector => Some(selector),
        })
    }
}

impl Layers {
    fn new(fields: &Fields) -> Result<Self> {
        let mut patterns = Patterns::new("layers_pattern");
        for pattern in fields.strings("layers_pattern")? {
            patterns.add(r"^(?:.*?\.)?(?:", pattern, r")\.\d+\.")?;
        }
        Ok(Self {
            layers: fields.integers("layers_to_transform")?,
            patterns,
        })
    }

    fn contain(&self, key: &str, layer: usize) -> Result<bool> {
        if self.layers.is_empty() {
            return Ok(true);
        }
        let listed = self
            .layers
            .iter()
            .any(|listed| usize::try_from(*listed) == Ok(layer));
        Ok(listed && self.name_matches(key)?)
    }

    fn name_matches(&self, key: &str) -> Result<bool> {
        Ok(self.patterns.is_empty() || self.patterns.any_matches(key)?)
    }
}

fn ends_with_any(key: &str, names: &[String]) -> bool {
    let ends_with = |name: &String| key.strip_suffix(name.as_str()).is_some_and(is_path_end);
    names.iter().any(ends_with)
}

/// Whether what precedes a name leaves it a whole path or the end of one after a dot.
fn is_path_end(rest: &str) -> bool {
    rest.is_empty() || rest.ends_with('.')
}
