//! Tensor names as trainers leave them, brought back to those that PEFT saves for a plain causal language model.
//!
//! ```text
//! _orig_mod.base_model.model.model.language_model.layers.3._fsdp_wrapped_module.self_attn.q_proj.lora_A.mine.weight
//! wrapper   PEFT's prefix    root                 layer   wrapper              module           half   name
//! ```
//! A name that has no such form stays as it is: whoever binds it refuses it. Two tensors never become one.

use std::collections::BTreeMap;

use crate::error::{Error, Result};
use crate::weights::Source;

/// PEFT's prefix, before the names of the model it was made for.
const PREFIX: [&str; 2] = ["base_model", "model"];
/// Modules that compilers, data parallelism and checkpointing put around others.
const WRAPPERS: &[&str] = &[
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_orig_mod",
    "module",
];
/// Modules around the layers of a language model, alone or inside a model for images or audio.
const ROOTS: &[&str] = &["language_model", "llm", "model", "text_model"];
const PLAIN_ROOT: &str = "model.";
/// Modules beside the layers, and where a plain model has them.
const BESIDE_LAYERS: &[(&str, &str)] = &[
    ("embed_tokens", "model.embed_tokens"),
    ("lm_head", "lm_head"),
    ("norm", "model.norm"),
    ("score", "score"),
    ("classifier", "classifier"),
];
/// Those of them that stand beside the root, not in it.
const OUTSIDE_ROOT: &[&str] = &["lm_head", "score", "classifier"];
/// What other tools call the two halves, and PEFT.
const HALVES: &[(&str, &str)] = &[("lora_down", "lora_A"), ("lora_up", "lora_B")];
/// Parts of an adapter whose own name may follow them.
const NAMED_PARTS: &[&str] = &["lora_A", "lora_B"];
/// The same, where nothing follows the name.
const NAMED_LAST: &[&str] = &[
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
];
/// Where PEFT keeps whole modules and rows of an adapter, whose name follows; their files have neither.
const SAVED_PART: &str = "modules_to_save";
const TOKENS_PART: [&str; 2] = ["token_adapter", "trainable_tokens_delta"];
/// PEFT's own name of an adapter that was given none.
const DEFAULT_NAME: &str = "default";

/// The tensors of one adapter under PEFT's names.
pub(crate) struct Names {
    pub(crate) tensors: BTreeMap<String, Source>,
    /// Scalars in place of `lora_alpha`, by what precedes ".alpha".
    pub(crate) alphas: BTreeMap<String, Source>,
    /// Whether halves are called down and up: then nothing but an alpha says how they are scaled.
    pub(crate) has_down_and_up: bool,
    /// What may precede `layers.0.…` in the paths that the config's patterns were written for, likeliest first.
    pub(crate) roots: Vec<String>,
    pub(crate) notes: Vec<String>,
}

/// One name in the form above.
#[derive(Debug, PartialEq, Eq)]
struct Name<'a> {
    wrappers: Vec<&'a str>,
    has_prefix: bool,
    /// `model.` or `model.language_model.`; `None` where the tensor does not tell.
    root: Option<String>,
    /// The root with its wrappers.
    wrapped_root: Option<String>,
    /// `model.layers.3.self_attn.q_proj` or `model.norm`.
    module: String,
    /// `.lora_A.weight`, or what else follows the module.
    rest: String,
    adapter: Option<&'a str>,
    is_down_or_up: bool,
}

impl Names {
    /// Refuses names of two adapters, of two roots, or of one tensor.
    pub(crate) fn read(sources: BTreeMap<String, Source>) -> Result<Self> {
        let mut names = Self {
            tensors: BTreeMap::new(),
            alphas: BTreeMap::new(),
            has_down_and_up: false,
            roots: Vec::new(),
            notes: Vec::new(),
        };
        let mut seen = Seen::default();
        for (text, source) in sources {
            let Some(name) = Name::parse(&text) else {
                names.enter(text, source)?;
                continue;
            };
            seen.add(&name, &text)?;
            names.has_down_and_up |= name.is_down_or_up;
            let module = format!("base_model.model.{}", name.module);
            if name.rest == ".alpha" {
                enter(&mut names.alphas, module, source)?;
            } else {
                names.enter(module + &name.rest, source)?;
            }
        }
        names.roots = seen.roots();
        names.notes = seen.notes(names.alphas.len());
        Ok(names)
    }

    fn enter(&mut self, name: String, source: Source) -> Result<()> {
        enter(&mut self.tensors, name, source)
    }
}

fn enter(map: &mut BTreeMap<String, Source>, name: String, source: Source) -> Result<()> {
    let second = source.name.clone();
    match map.insert(name, source) {
        Some(first) => Err(Error::Duplicate {
            first: first.name,
            second,
        }),
        None => Ok(()),
    }
}

impl<'a> Name<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let all: Vec<&str> = text.split('.').collect();
        let is_wrapper = |part: &&str| WRAPPERS.contains(part);
        let wrappers = all.iter().copied().filter(is_wrapper).collect();
        let parts: Vec<&str> = all
            .iter()
            .copied()
            .filter(|part| !is_wrapper(part))
            .collect();
        let inner = parts.strip_prefix(&PREFIX).filter(|rest| rest.len() > 1);
        let has_prefix = inner.is_some();
        let (root, module, rest) = split_module(inner.unwrap_or(&parts))?;
        let wrapped_root = root.as_ref().and_then(|_| wrapped_root(&all));
        let mut name = Self {
            wrappers,
            has_prefix,
            root,
            wrapped_root,
            module,
            rest: String::new(),
            adapter: None,
            is_down_or_up: false,
        };
        name.take_rest(rest);
        Some(name)
    }

    /// `lora_down.mine.weight` → `.lora_A.weight`.
    fn take_rest(&mut self, rest: &[&'a str]) {
        let mut rest = rest.to_vec();
        let half = HALVES.iter().find(|(name, _)| rest.first() == Some(name));
        if let (Some((_, half)), Some(&"weight")) = (half, rest.last()) {
            rest[0] = half;
            self.is_down_or_up = true;
        }
        let name_at = match rest[..] {
            [part, _, "weight" | "bias"] => NAMED_PARTS.contains(&part) || part == NAMED_LAST[2],
            [part, last] => NAMED_LAST.contains(&part) && last != "weight",
            _ => false,
        };
        if name_at {
            self.adapter = Some(rest.remove(1));
        }
        match rest[..] {
            [SAVED_PART, adapter, last @ ("weight" | "bias")] => {
                self.adapter = Some(adapter);
                rest = vec![last];
            }
            [first, second, adapter] if [first, second] == TOKENS_PART => {
                self.adapter = Some(adapter);
                rest.pop();
            }
            _ => {}
        }
        self.rest = rest.iter().flat_map(|part| [".", part]).collect();
    }
}

/// (root, path in a plain model, what follows it) of a name without prefix and wrappers.
fn split_module<'a, 'b>(parts: &'b [&'a str]) -> Option<(Option<String>, String, &'b [&'a str])> {
    let num_roots = parts.iter().take_while(|part| ROOTS.contains(part)).count();
    let (roots, inner) = parts.split_at(num_roots);
    let root: String = roots.iter().flat_map(|part| [*part, "."]).collect();
    if let ["layers", layer, path @ ..] = inner {
        let number: usize = layer.parse().ok()?;
        let end = path.iter().position(|part| is_end(part))?;
        let (path, rest) = path.split_at(end);
        let is_foreign = path.iter().any(|part| part.starts_with("lora_"));
        let is_canonical = number.to_string() == *layer && !path.is_empty() && !is_foreign;
        let module = format!("model.layers.{layer}.{}", path.join("."));
        return is_canonical.then_some((Some(root), module, rest));
    }
    let (first, rest) = inner.split_first()?;
    let (_, module) = BESIDE_LAYERS.iter().find(|(name, _)| name == first)?;
    let root = (!OUTSIDE_ROOT.contains(first)).then_some(root);
    Some((root, (*module).into(), rest))
}

/// Whether a part of a name is behind the module's path.
fn is_end(part: &str) -> bool {
    let is_half = HALVES.iter().any(|(name, _)| *name == part);
    is_half
        || NAMED_PARTS.contains(&part)
        || NAMED_LAST.contains(&part)
        || ["alpha", "bias", "weight", SAVED_PART].contains(&part)
}

/// The root of a name as the name has it.
fn wrapped_root(all: &[&str]) -> Option<String> {
    let prefix = all.windows(2).position(|pair| pair == PREFIX);
    let inner = &all[prefix.map_or(0, |start| start + 2)..];
    let end = inner.iter().position(|part| *part == "layers")?;
    Some(inner[..end].iter().flat_map(|part| [*part, "."]).collect())
}

/// A value that all names of a file share, and the first name that has it.
struct Shared<T>(Option<(T, String)>);

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T: PartialEq + Clone> Shared<T> {
    /// The name that has another value.
    fn add(&mut self, value: &T, name: &str) -> std::result::Result<(), String> {
        let (first, first_name) = self.0.get_or_insert_with(|| (value.clone(), name.into()));
        if first == value {
            Ok(())
        } else {
            Err(first_name.clone())
        }
    }
}

/// What the names of a file have in common, and how many have what is taken out.
#[derive(Default)]
struct Seen {
    has_prefix: Shared<bool>,
    root: Shared<String>,
    adapter: Shared<String>,
    /// How many names have each.
    wrapped_roots: BTreeMap<String, usize>,
    wrappers: BTreeMap<String, usize>,
    num_names: usize,
    num_down_or_up: usize,
}

impl Seen {
    fn add(&mut self, name: &Name, text: &str) -> Result<()> {
        let mixed = |what: &'static str, first: String| Error::MixedNames {
            what,
            first,
            second: text.into(),
        };
        self.num_names += 1;
        self.num_down_or_up += usize::from(name.is_down_or_up);
        for wrapper in &name.wrappers {
            *self.wrappers.entry((*wrapper).into()).or_default() += 1;
        }
        self.has_prefix
            .add(&name.has_prefix, text)
            .map_err(|first| mixed("with and without 'base_model.model.'", first))?;
        if let Some(root) = &name.root {
            self.root
                .add(root, text)
                .map_err(|first| mixed("of two models", first))?;
        }
        if let Some(root) = &name.wrapped_root {
            *self.wrapped_roots.entry(root.clone()).or_default() += 1;
        }
        let adapter = name.adapter.unwrap_or(DEFAULT_NAME).to_string();
        if name.rest.starts_with(".lora_") || name.adapter.is_some() {
            self.adapter
                .add(&adapter, text)
                .map_err(|first| mixed("of two adapters", first))?;
        }
        Ok(())
    }

    /// PEFT matched what it found before others wrapped it, or, where a compiled model was given to it, that;
    /// patterns for a plain model come last, of files whose names were changed and whose config was not.
    fn roots(&self) -> Vec<String> {
        let mut roots: Vec<String> = Vec::new();
        let own = self.root.0.iter().map(|(root, _)| root);
        let wrapped = (self.wrapped_roots.len() == 1).then_some(self.wrapped_roots.keys());
        let plain = PLAIN_ROOT.to_string();
        for root in own.chain(wrapped.into_iter().flatten()).chain([&plain]) {
            if !roots.contains(root) {
                roots.push(root.clone());
            }
        }
        roots
    }

    fn notes(&self, num_alphas: usize) -> Vec<String> {
        let wrappers = self.wrappers.iter();
        let mut notes: Vec<String> = wrappers
            .map(|(wrapper, count)| format!("names: '{wrapper}.' taken out of {count} names"))
            .collect();
        let num_names = self.num_names;
        if let Some((false, _)) = self.has_prefix.0 {
            notes.push(format!(
                "names: 'base_model.model.' put before {num_names} names"
            ));
        }
        if let Some((root, _)) = self.root.0.as_ref().filter(|(root, _)| root != PLAIN_ROOT) {
            notes.push(format!("names: '{root}layers.' read as 'model.layers.'"));
        }
        if let Some((adapter, _)) = self
            .adapter
            .0
            .as_ref()
            .filter(|(name, _)| name != DEFAULT_NAME)
        {
            notes.push(format!(
                "names: saved under the adapter name {adapter:?}, which is taken out"
            ));
        }
        if self.num_down_or_up > 0 {
            let count = self.num_down_or_up;
            notes.push(format!(
                "names: lora_down and lora_up read as lora_A and lora_B in {count} names"
            ));
        }
        if num_alphas > 0 {
            notes.push(format!("alpha: given by {num_alphas} tensors"));
        }
        notes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Option<String> {
        let name = Name::parse(text)?;
        Some(format!("base_model.model.{}{}", name.module, name.rest))
    }

    #[test]
    fn names_of_trainers_become_pefts() {
        const Q: &str = "base_model.model.model.layers.1.self_attn.q_proj";
        for (text, rest) in [
            (
                "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
                ".lora_A.weight",
            ),
            (
                "base_model.model.layers.1.self_attn.q_proj.lora_A.weight",
                ".lora_A.weight",
            ),
            (
                "model.layers.1.self_attn.q_proj.lora_down.weight",
                ".lora_A.weight",
            ),
            (
                "layers.1.self_attn.q_proj.lora_up.x.weight",
                ".lora_B.weight",
            ),
            (
                "base_model.model._orig_mod.model.layers.1.self_attn.q_proj.lora_B.mine.bias",
                ".lora_B.bias",
            ),
            (
                "_fsdp_wrapped_module.base_model.model.model.layers.1._fsdp_wrapped_module.self_attn.q_proj\
                 .lora_magnitude_vector.default.weight",
                ".lora_magnitude_vector.weight",
            ),
            (
                "module.base_model.model.language_model.model.layers.1.self_attn.q_proj.lora_magnitude_vector.a",
                ".lora_magnitude_vector",
            ),
            (
                "base_model.model.model.layers.1.self_attn.q_proj.alpha",
                ".alpha",
            ),
            (
                "base_model.model.model.layers.1.self_attn.q_proj.bias",
                ".bias",
            ),
        ] {
            assert_eq!(parsed(text), Some(format!("{Q}{rest}")), "{text}");
        }
        for (text, expected) in [
            (
                "base_model.model.model.language_model.embed_tokens.weight",
                "model.embed_tokens.weight",
            ),
            (
                "base_model.model.language_model.lm_head.weight",
                "lm_head.weight",
            ),
            ("lm_head.lora_A.default.weight", "lm_head.lora_A.weight"),
            (
                "base_model.model.lm_head.modules_to_save.default.weight",
                "lm_head.weight",
            ),
            (
                "base_model.model.lm_head.modules_to_save.weight",
                "lm_head.modules_to_save.weight",
            ),
            (
                "base_model.model.score.modules_to_save.default.weight",
                "score.weight",
            ),
            ("classifier.bias", "classifier.bias"),
            (
                "model.layers.1.input_layernorm.modules_to_save.mine.weight",
                "model.layers.1.input_layernorm.weight",
            ),
            (
                "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta.default",
                "model.embed_tokens.token_adapter.trainable_tokens_delta",
            ),
            (
                "base_model.model.model.embed_tokens.lora_embedding_A.mine",
                "model.embed_tokens.lora_embedding_A",
            ),
        ] {
            assert_eq!(
                parsed(text),
                Some(format!("base_model.model.{expected}")),
                "{text}"
            );
        }
    }

    #[test]
    fn other_names_stay() {
        for text in [
            "",
            "layers",
            "layers.1",
            "base_model.model",
            "base_model.model.model.vision_tower.layers.1.self_attn.q_proj.lora_A.weight",
            "base_model.model.base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.01.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.-1.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.1.lora_A.weight",
            "base_model.model.model.layers.1.self_attn.q_proj.lora_a.weight",
        ] {
            assert_eq!(parsed(text), None, "{text}");
        }
    }
}
