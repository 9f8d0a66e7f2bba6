//! What a receipt says of an adapter, in words.

use std::collections::BTreeSet;

use crate::bind::Binding;
use crate::norms::Norm;
use crate::replaced_rows::ReplacedRows;
use crate::shape::BaseShape;
use crate::tensor_name::TokenModule;
use crate::token_lora::TokenLora;

pub(crate) fn invocation_note(tokens: &[i32]) -> Option<String> {
    let listed: Vec<_> = tokens.iter().map(i32::to_string).collect();
    let listed = listed.join(", ");
    let note = format!("aLoRA: acts from the last place in the prompt where tokens {listed} are");
    (!tokens.is_empty()).then_some(note)
}

/// What the adapter has beyond A and B.
pub(crate) fn column_notes(bindings: &[Binding]) -> Vec<String> {
    let count = |has: fn(&Binding) -> bool| bindings.iter().filter(|binding| has(binding)).count();
    let kinds = [
        (count(|b| b.magnitude.is_some()), "DoRA on"),
        (count(|b| b.b_bias.is_some()), "lora_bias on"),
        (
            count(|b| b.bias.is_some()),
            "trained biases in place of the base's on",
        ),
    ];
    let found = kinds.into_iter().filter(|(count, _)| *count > 0);
    found
        .map(|(count, what)| format!("{what} {count} modules"))
        .collect()
}

/// A gain depends on the weight and on the order of adapters, and of two biases one replaces the other.
pub(crate) fn alone(
    bindings: &[Binding],
    rows: &ReplacedRows,
    norms: &[Norm],
) -> Option<&'static str> {
    let has = |has: fn(&Binding) -> bool| bindings.iter().any(has);
    if has(|binding| binding.magnitude.is_some()) {
        Some("it has DoRA (use_dora)")
    } else if has(|binding| binding.bias.is_some()) {
        Some("it has biases in place of the base's (bias)")
    } else if !rows.is_empty() {
        Some("it has rows of embedding or head in place of the base's")
    } else if !norms.is_empty() {
        Some("it has norms in place of the base's")
    } else {
        None
    }
}

/// Last parts of the adapted paths, in the order the modules run.
pub(crate) fn module_names<'a>(
    bindings: impl Iterator<Item = &'a Binding>,
    token_loras: &[TokenLora],
    shape: &BaseShape,
) -> Vec<String> {
    let paths: BTreeSet<&str> = bindings.map(|binding| binding.path.as_str()).collect();
    let mut paths: Vec<&str> = paths.into_iter().collect();
    paths.sort_by_key(|path| {
        let module = &shape.modules[*path];
        (module.group, module.out_offset)
    });
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_string();
    let named = |wanted: TokenModule| {
        let found = token_loras.iter().filter(move |lora| lora.module == wanted);
        found.map(|lora| lora.module.name().to_string())
    };
    let layers = paths.into_iter().map(last);
    let first = named(TokenModule::Embedding);
    first
        .chain(layers)
        .chain(named(TokenModule::Head))
        .collect()
}

pub(crate) fn base_check(modules: usize, layers: usize, num_layers: usize) -> String {
    format!(
        "all {modules} adapted modules match the base's shapes, in {layers} of {num_layers} layers"
    )
}
