//! Every tensor of a file bound to a module of the base model, from names and shapes alone.

use std::collections::BTreeMap;

use safetensors::Dtype;

use crate::alpha::{Alphas, StoredAlpha, refuse_unused};
use crate::config::{Config, TrainedBias};
use crate::error::{Error, Result};
use crate::names::Names;
use crate::shape::{BaseShape, ModuleShape};
use crate::tensor_name::{Part, TensorName, module_key, refuse_unsupported};
use crate::weights::Source;

/// `lora_A` and `lora_B`.
#[derive(Debug)]
pub(crate) struct Factors {
    pub(crate) a: Source,
    pub(crate) b: Source,
}

/// One adapted module, all parts found and fitting.
#[derive(Debug)]
pub(crate) struct Binding {
    pub(crate) layer: usize,
    pub(crate) path: String,
    /// 0 without factors.
    pub(crate) rank: usize,
    pub(crate) scale: f32,
    pub(crate) factors: Option<Factors>,
    pub(crate) b_bias: Option<Source>,
    pub(crate) magnitude: Option<Source>,
    /// In place of the base's.
    pub(crate) bias: Option<Source>,
}

impl Binding {
    /// Tensors of the file, in a fixed order.
    pub(crate) fn sources(&self) -> impl Iterator<Item = &Source> {
        let factors = self.factors.iter().flat_map(|pair| [&pair.a, &pair.b]);
        let columns = [&self.b_bias, &self.magnitude, &self.bias];
        factors.chain(columns.into_iter().flatten())
    }
}

type Parts = BTreeMap<Part, Source>;

/// Bindings in order of (layer, path); fails on the first tensor that has no place.
pub(crate) fn bind(
    names: Names,
    mut alphas: Alphas,
    config: &Config,
    shape: &BaseShape,
    max_lora_rank: usize,
) -> Result<Vec<Binding>> {
    refuse_unsupported(&names.tensors)?;
    let mut modules: BTreeMap<(usize, String), Parts> = BTreeMap::new();
    for (name, source) in names.tensors {
        let parsed = TensorName::parse(&name, &source.name, shape)?;
        let parts = modules.entry((parsed.layer, parsed.path)).or_default();
        let second = source.name.clone();
        if let Some(Source { name: first, .. }) = parts.insert(parsed.part, source) {
            return Err(Error::Duplicate { first, second });
        }
    }
    let mut bindings = Vec::new();
    let mut module_alphas = Vec::new();
    for ((layer, path), parts) in modules {
        let binding = bind_module(layer, path, parts, config, shape)?;
        let alpha = match &binding.factors {
            Some(factors) => {
                let alpha = alphas.remove(&format!("base_model.model.{}", binding.key()));
                if names.has_down_and_up && alpha.is_none() && !config.has_alpha() {
                    return Err(without_alpha(factors));
                }
                alpha
            }
            None => None,
        };
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
        if binding.factors.is_none() {
            scales.push(1.0);
            continue;
        }
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

fn without_alpha(factors: &Factors) -> Error {
    let reason = format!(
        "is missing, and tensor {} has no alpha beside it: say how the adapter is scaled",
        factors.a.name
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
fn bind_module(
    layer: usize,
    path: String,
    mut parts: Parts,
    config: &Config,
    shape: &BaseShape,
) -> Result<Binding> {
    let key = module_key(layer, &path);
    let module = &shape.modules[&path];
    let factors = pair(&mut parts)?;
    let rank = match &factors {
        Some(factors) => check_shapes(&key, &factors.a, &factors.b, module)?,
        None => 0,
    };
    let b_bias = parts.remove(&Part::BBias);
    let magnitude = parts.remove(&Part::Magnitude);
    let halves = factors.as_ref();
    check_part(b_bias.as_ref(), halves, &key, &LORA_BIAS, config.lora_bias)?;
    check_part(magnitude.as_ref(), halves, &key, &DORA, config.use_dora)?;
    let bias = take_bias(parts, factors.is_some(), &key, config, module)?;
    for source in [&b_bias, &magnitude, &bias].into_iter().flatten() {
        check_vector(source, module.out_features)?;
    }
    Ok(Binding {
        layer,
        path,
        rank,
        scale: 1.0,
        factors,
        b_bias,
        magnitude,
        bias,
    })
}

fn pair(parts: &mut Parts) -> Result<Option<Factors>> {
    match (parts.remove(&Part::A), parts.remove(&Part::B)) {
        (Some(a), Some(b)) => Ok(Some(Factors { a, b })),
        (Some(only), None) => Err(Error::Unpaired {
            tensor: only.name,
            missing: "lora_B",
        }),
        (None, Some(only)) => Err(Error::Unpaired {
            tensor: only.name,
            missing: "lora_A",
        }),
        (None, None) => Ok(None),
    }
}

/// A tensor that every module with factors has, if a field says so.
struct PartField {
    name: &'static str,
    field: &'static str,
}

const DORA: PartField = PartField {
    name: "lora_magnitude_vector",
    field: "use_dora",
};
const LORA_BIAS: PartField = PartField {
    name: "lora_B.bias",
    field: "lora_bias",
};

fn check_part(
    part: Option<&Source>,
    factors: Option<&Factors>,
    key: &str,
    of: &PartField,
    is_set: bool,
) -> Result<()> {
    match (part, factors) {
        (None, Some(_)) if is_set => Err(Error::MissingPart {
            tensor: format!("base_model.model.{key}.{}", of.name),
            field: of.field,
        }),
        (Some(source), _) if !is_set => Err(Error::UnwantedPart {
            tensor: source.name.clone(),
            field: of.field,
            value: "false",
        }),
        (Some(source), None) => Err(Error::Unpaired {
            tensor: source.name.clone(),
            missing: "lora_A",
        }),
        _ => Ok(()),
    }
}

/// The trained bias, under the name that PEFT reads it by.
fn take_bias(
    mut parts: Parts,
    is_wrapped: bool,
    key: &str,
    config: &Config,
    module: &ModuleShape,
) -> Result<Option<Source>> {
    let (own, other) = if is_wrapped {
        (Part::WrappedBias, Part::Bias)
    } else {
        (Part::Bias, Part::WrappedBias)
    };
    if let Some(Source { name, .. }) = parts.remove(&other) {
        let (why, end) = if is_wrapped {
            ("targets its module", "base_layer.bias")
        } else {
            ("does not target its module", "bias")
        };
        return Err(Error::MisplacedBias {
            tensor: name,
            why,
            expected: format!("base_model.model.{key}.{end}"),
        });
    }
    let Some(source) = parts.remove(&own) else {
        return Ok(None);
    };
    let is_trained = match config.bias {
        TrainedBias::None => false,
        TrainedBias::LoraOnly => is_wrapped,
        TrainedBias::All => true,
    };
    let tensor = source.name.clone();
    if !is_trained {
        return Err(Error::UnwantedPart {
            tensor,
            field: "bias",
            value: config.bias.name(),
        });
    }
    if !module.has_bias {
        return Err(Error::NoBias { tensor });
    }
    if !config.invocation_tokens.is_empty() {
        return Err(Error::field(
            "alora_invocation_tokens",
            format!(
                "can't be used with trained biases ({tensor}), which act before an invocation too"
            ),
        ));
    }
    Ok(Some(source))
}

pub(crate) fn check_vector(source: &Source, expected: usize) -> Result<()> {
    check_dtype(source)?;
    let shape = &source.info.shape;
    if shape[..] == [expected] {
        return Ok(());
    }
    Err(Error::Vector {
        tensor: source.name.clone(),
        shape: shape.clone(),
        expected,
        remedy: if shape[..] == [0] { EMPTY } else { "" },
    })
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

pub(crate) fn check_dtype(source: &Source) -> Result<()> {
    if matches!(source.info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Ok(());
    }
    Err(Error::Dtype {
        tensor: source.name.clone(),
        dtype: source.info.dtype.to_string(),
    })
}

pub(crate) fn matrix_shape(source: &Source) -> Result<[usize; 2]> {
    check_dtype(source)?;
    let shape = &source.info.shape;
    let matrix = <[usize; 2]>::try_from(shape.as_slice());
    matrix.map_err(|_| Error::Dimensions {
        tensor: source.name.clone(),
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

/// The modules with factors are exactly those the config targets.
fn check_targets(
    bindings: &[Binding],
    root: &str,
    config: &Config,
    shape: &BaseShape,
) -> Result<()> {
    let bound: BTreeMap<_, _> = bindings
        .iter()
        .filter_map(|b| Some(((b.layer, b.path.as_str()), b.factors.as_ref()?)))
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
                (Some(false), Some(factors)) => {
                    return Err(Error::Untargeted {
                        tensor: factors.a.name.clone(),
                    });
                }
                _ => {}
            }
        }
    }
    Ok(())
}
