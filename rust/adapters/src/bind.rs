//! Every tensor of a file bound to a module of the base model, from names and shapes alone.

use std::collections::BTreeMap;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::shape::{BaseShape, ModuleShape};
use crate::tensor_name::{Half, TensorName, module_key, refuse_unsupported};

/// A tensor of the file: its name and where it lies.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) info: TensorInfo,
}

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
    tensors: BTreeMap<String, TensorInfo>,
    config: &Config,
    shape: &BaseShape,
    max_lora_rank: usize,
) -> Result<Vec<Binding>> {
    refuse_unsupported(&tensors.keys())?;
    let mut halves: BTreeMap<(usize, String), Halves> = BTreeMap::new();
    for (name, info) in tensors {
        let parsed = TensorName::parse(&name, shape)?;
        let pair = halves.entry((parsed.layer, parsed.path)).or_default();
        let half = if parsed.half == Half::A {
            &mut pair.0
        } else {
            &mut pair.1
        };
        if let Some(Source { name, .. }) = half.replace(Source { name, info }) {
            return Err(Error::Duplicate { tensor: name });
        }
    }
    let bindings = halves
        .into_iter()
        .map(|((layer, path), halves)| bind_module(layer, path, halves, config, shape))
        .collect::<Result<Vec<_>>>()?;
    check_limit(&bindings, max_lora_rank)?;
    check_targets(&bindings, config, shape)?;
    Ok(bindings)
}

fn bind_module(
    layer: usize,
    path: String,
    halves: Halves,
    config: &Config,
    shape: &BaseShape,
) -> Result<Binding> {
    let (a, b) = pair(halves)?;
    let key = module_key(layer, &path);
    let rank = check_shapes(&key, &a, &b, &shape.modules[&path])?;
    let expected = config.rank(&key)?;
    if rank != expected {
        return Err(Error::RankConfig {
            module: key,
            rank,
            expected,
        });
    }
    let scale = config.scale(&key, rank)?;
    Ok(Binding {
        layer,
        path,
        rank,
        scale,
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
            module: module_key(largest.layer, &largest.path),
            rank: largest.rank,
            limit,
        }),
        _ => Ok(()),
    }
}

/// The modules with tensors are exactly those the config targets.
fn check_targets(bindings: &[Binding], config: &Config, shape: &BaseShape) -> Result<()> {
    let bound: BTreeMap<_, _> = bindings
        .iter()
        .map(|b| ((b.layer, b.path.as_str()), b))
        .collect();
    for layer in 0..shape.num_layers {
        for path in shape.modules.keys() {
            let key = module_key(layer, path);
            let targeted = config.targets.contains(&key, layer)?;
            match (targeted, bound.get(&(layer, path.as_str()))) {
                (Some(true), None) => return Err(Error::TargetWithoutTensors { module: key }),
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
