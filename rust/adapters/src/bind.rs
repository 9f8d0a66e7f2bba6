//! Every tensor of a file bound to a module of the base model, from names and shapes alone.

use std::collections::BTreeMap;

use safetensors::Dtype;

use crate::alpha::{Alphas, StoredAlpha, refuse_unused};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::names::Names;
use crate::shape::{BaseShape, ModuleShape};
use crate::tensor_name::{Half, TensorName, module_key, refuse_unsupported};
use crate::weights::Source;

/// One adapted module, both halves found and fitting.
#[derive(Debug)]
pub(crate) struct Binding {
    pub(crate) layer: usize,
    pub(crate) path: String,
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    pub(crate) a: Source,
    pub(crate) b: Source,
}

type Halves = (Option<Source>, Option<Source>);

/// Bindings in order of (layer, path); fails on the first tensor that has no place.
pub(crate) fn bind(
    names: Names,
    mut alphas: Alphas,
    config: &Config,
    shape: &BaseShape,
    max_lora_rank: usize,
) -> Result<Vec<Binding>> {
    refuse_unsupported(&names.tensors)?;
    let mut halves: BTreeMap<(usize, String), Halves> = BTreeMap::new();
    for (name, source) in names.tensors {
        let parsed = TensorName::parse(&name, &source.name, shape)?;
        let pair = halves.entry((parsed.layer, parsed.path)).or_default();
        match parsed.half {
            Half::A => pair.0 = Some(source),
            Half::B => pair.1 = Some(source),
        }
    }
    let mut bindings = Vec::new();
    let mut module_alphas = Vec::new();
    for ((layer, path), halves) in halves {
        let binding = bind_module(layer, path, halves, shape)?;
        let alpha = alphas.remove(&format!("base_model.model.{}", binding.key()));
        if names.has_down_and_up && alpha.is_none() && !config.has_alpha() {
            return Err(without_alpha(&binding));
        }
        bindings.push(binding);
        module_alphas.push(alpha);
    }
    refuse_unused(alphas)?;
    check_limit(&bindings, max_lora_rank)?;
    configure(&mut bindings, &module_alphas, &names.roots, config, shape)?;
    Ok(bindings)
}

/// Scales of the first root under which the config says what the tensors say; the first one's error else.
fn configure(
    bindings: &mut [Binding],
    alphas: &[Option<StoredAlpha>],
    roots: &[String],
    config: &Config,
    shape: &BaseShape,
) -> Result<()> {
    let mut first_error = None;
    for root in roots {
        match scales(bindings, alphas, root, config, shape) {
            Ok(scales) => {
                for (binding, scale) in bindings.iter_mut().zip(scales) {
                    binding.scale = scale;
                }
                return Ok(());
            }
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    Err(first_error.expect("invariant: there is a root"))
}

fn scales(
    bindings: &[Binding],
    alphas: &[Option<StoredAlpha>],
    root: &str,
    config: &Config,
    shape: &BaseShape,
) -> Result<Vec<f32>> {
    let mut scales = Vec::new();
    for (binding, alpha) in bindings.iter().zip(alphas) {
        let key = path_under(root, binding.layer, &binding.path);
        let expected = config.rank(&key)?;
        if binding.rank != expected {
            return Err(Error::RankConfig {
                module: binding.key(),
                rank: binding.rank,
                expected,
            });
        }
        scales.push(config.scale(&key, binding.rank, alpha.as_ref())?);
    }
    check_targets(bindings, root, config, shape)?;
    Ok(scales)
}

/// The path that a config's patterns are matched against.
fn path_under(root: &str, layer: usize, path: &str) -> String {
    format!("{root}layers.{layer}.{path}")
}

fn without_alpha(binding: &Binding) -> Error {
    let reason = format!(
        "is missing, and tensor {} has no alpha beside it: say how the adapter is scaled",
        binding.a.name
    );
    Error::field("lora_alpha", reason)
}

impl Binding {
    /// `model.layers.0.self_attn.q_proj`
    pub(crate) fn key(&self) -> String {
        module_key(self.layer, &self.path)
    }
}

/// Not scaled yet.
fn bind_module(layer: usize, path: String, halves: Halves, shape: &BaseShape) -> Result<Binding> {
    let (a, b) = pair(halves)?;
    let rank = check_shapes(&module_key(layer, &path), &a, &b, &shape.modules[&path])?;
    Ok(Binding {
        layer,
        path,
        rank,
        scale: 1.0,
        a,
        b,
    })
}

fn pair(halves: Halves) -> Result<(Source, Source)> {
    match halves {
        (Some(a), Some(b)) => Ok((a, b)),
        (Some(only), None) => Err(Error::Unpaired {
            tensor: only.name,
            missing: "lora_B",
        }),
        (None, Some(only)) => Err(Error::Unpaired {
            tensor: only.name,
            missing: "lora_A",
        }),
        (None, None) => unreachable!("a pair is entered with its first half"),
    }
}

const EMPTY: &str = ": DeepSpeed ZeRO-3 saved it before gathering its parts, save it with \
                     stage3_gather_16bit_weights_on_model_save";

/// Checks dtypes and shapes of both halves and returns their rank.
fn check_shapes(key: &str, a: &Source, b: &Source, module: &ModuleShape) -> Result<usize> {
    let [a_rank, in_features] = matrix_shape(a)?;
    let [out_features, b_rank] = matrix_shape(b)?;
    check_features(key, "in_features", in_features, module.in_features)?;
    check_features(key, "out_features", out_features, module.out_features)?;
    if a_rank != b_rank {
        return Err(Error::RankPair {
            module: key.into(),
            a: a_rank,
            b: b_rank,
        });
    }
    if a_rank == 0 {
        return Err(Error::RankZero { module: key.into() });
    }
    Ok(a_rank)
}

fn matrix_shape(source: &Source) -> Result<[usize; 2]> {
    let tensor = || source.name.clone();
    if !matches!(source.info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err(Error::Dtype {
            tensor: tensor(),
            dtype: source.info.dtype.to_string(),
        });
    }
    let shape = &source.info.shape;
    let matrix = <[usize; 2]>::try_from(shape.as_slice());
    matrix.map_err(|_| Error::Dimensions {
        tensor: tensor(),
        shape: shape.clone(),
        remedy: if shape[..] == [0] { EMPTY } else { "" },
    })
}

fn check_features(key: &str, side: &'static str, adapter: usize, base: usize) -> Result<()> {
    if adapter != base {
        return Err(Error::Features {
            module: key.into(),
            side,
            adapter,
            base,
        });
    }
    Ok(())
}

/// Names the largest rank, so that raising the limit once is enough.
fn check_limit(bindings: &[Binding], limit: usize) -> Result<()> {
    match bindings.iter().max_by_key(|binding| binding.rank) {
        Some(largest) if largest.rank > limit => Err(Error::RankLimit {
            module: largest.key(),
            rank: largest.rank,
            limit,
        }),
        _ => Ok(()),
    }
}

/// The modules with tensors are exactly those the config targets.
fn check_targets(
    bindings: &[Binding],
    root: &str,
    config: &Config,
    shape: &BaseShape,
) -> Result<()> {
    let bound: BTreeMap<_, _> = bindings
        .iter()
        .map(|b| ((b.layer, b.path.as_str()), b))
        .collect();
    for layer in 0..shape.num_layers {
        for path in shape.modules.keys() {
            let targeted = config
                .targets
                .contains(&path_under(root, layer, path), layer)?;
            match (targeted, bound.get(&(layer, path.as_str()))) {
                (Some(true), None) => {
                    return Err(Error::TargetWithoutTensors {
                        module: module_key(layer, path),
                    });
                }
                (Some(false), Some(binding)) => {
                    return Err(Error::Untargeted {
                        tensor: binding.a.name.clone(),
                    });
                }
                _ => {}
            }
        }
    }
    Ok(())
}
