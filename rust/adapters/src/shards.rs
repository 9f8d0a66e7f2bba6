//! Sharded weights: which files of a directory are one adapter's, told by an index or by their names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::foreign::Entries;
use crate::read::{file_nbytes, io_error};

/// Files that say which tensor is in which shard; the second is a whole model's where a name has no `lora_`.
const INDEX_FILES: [&str; 2] = [
    "adapter_model.safetensors.index.json",
    "model.safetensors.index.json",
];
/// Longest accepted index in bytes, far above any adapter's.
const MAX_INDEX_NBYTES: u64 = 4 << 20;
/// Shards of one adapter, all open at once; real ones have a few.
const MAX_SHARDS: usize = 64;

/// The shards of one adapter, in order of their names.
pub(crate) struct Shards {
    pub(crate) files: Vec<PathBuf>,
    /// The index, if there is one, and the shard of each tensor.
    index: Option<(PathBuf, BTreeMap<String, usize>)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// What `directory` has of them.
    pub(crate) fn find(directory: &Path) -> Result<Option<Self>> {
        for name in INDEX_FILES {
            let path = directory.join(name);
            if path.is_file() {
                let map = read_index(&path)?;
                if name == INDEX_FILES[0] || map.keys().all(|tensor| is_lora(tensor)) {
                    return Self::of_index(directory, path, &map).map(Some);
                }
            }
        }
        Self::by_name(directory)
    }

    /// Index and shards say the same of every tensor; `shards` says which has it.
    pub(crate) fn check(&self, shards: &BTreeMap<&str, usize>) -> Result<()> {
        let Some((path, map)) = &self.index else {
            return Ok(());
        };
        let is_misplaced =
            |(tensor, shard): &(&String, &usize)| shards.get(tensor.as_str()) != Some(*shard);
        if let Some((tensor, shard)) = map.iter().find(is_misplaced) {
            let file = self.files[*shard].display();
            return Err(bad_index(path, format!("{file} has no tensor {tensor:?}")));
        }
        match shards.keys().find(|tensor| !map.contains_key(**tensor)) {
            Some(tensor) => {
                let reason = format!("it lacks tensor {tensor:?}, which a shard has");
                Err(bad_index(path, reason))
            }
            None => Ok(()),
        }
    }

    fn of_index(directory: &Path, path: PathBuf, map: &BTreeMap<String, String>) -> Result<Self> {
        let names: BTreeSet<&str> = map.values().map(String::as_str).collect();
        if let Some(name) = names.iter().find(|name| !is_plain_name(name)) {
            let reason = format!("{name:?} is no safetensors file of the same directory");
            return Err(bad_index(&path, reason));
        }
        if names.is_empty() || names.len() > MAX_SHARDS {
            let reason = format!("it names {} shards, limit is {MAX_SHARDS}", names.len());
            return Err(bad_index(&path, reason));
        }
        let numbers: BTreeMap<&str, usize> = names.iter().copied().zip(0..).collect();
        let shards = map
            .iter()
            .map(|(tensor, name)| (tensor.clone(), numbers[name.as_str()]));
        let index = shards.collect();
        Ok(Self {
            files: names.into_iter().map(|name| directory.join(name)).collect(),
            index: Some((path, index)),
        })
    }

    /// `adapter_model-00001-of-00002.safetensors` and the others, all of which are there.
    fn by_name(directory: &Path) -> Result<Option<Self>> {
        let entries = Entries::of(directory);
        let numbered = |name| Some((name, number_of(name)?));
        let mut names: Vec<(&str, (usize, usize))> = entries.files().filter_map(numbered).collect();
        names.sort_by_key(|(_, number)| *number);
        let Some((first, (_, total))) = names.first() else {
            return Ok(None);
        };
        let numbers = names.iter().map(|(_, number)| *number);
        if *total > MAX_SHARDS || !numbers.eq((1..=*total).map(|number| (number, *total))) {
            return Err(Error::Shards {
                path: directory.join(first),
                reason: format!(
                    "it is one of {total} shards, limit is {MAX_SHARDS}, and {} lie there: put all of them there, \
                     and no others",
                    names.len()
                ),
            });
        }
        Ok(Some(Self {
            files: names.iter().map(|(name, _)| directory.join(name)).collect(),
            index: None,
        }))
    }
}

fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let nbytes = file_nbytes(path)?;
    if nbytes > MAX_INDEX_NBYTES {
        let reason = format!("it has {nbytes} bytes, limit is {MAX_INDEX_NBYTES}");
        return Err(bad_index(path, reason));
    }
    let content = fs::read(path).map_err(|error| io_error(path, error))?;
    let index: Index =
        serde_json::from_slice(&content).map_err(|error| bad_index(path, error.to_string()))?;
    Ok(index.weight_map)
}

fn bad_index(path: &Path, reason: String) -> Error {
    Error::Shards {
        path: path.into(),
        reason,
    }
}

fn is_lora(tensor: &str) -> bool {
    tensor.to_ascii_lowercase().contains("lora_")
}

/// Whether a name can't lead out of its directory.
fn is_plain_name(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains(['/', '\\', '\0'])
}

/// (3, 12) of `adapter_model-00003-of-00012.safetensors`.
fn number_of(name: &str) -> Option<(usize, usize)> {
    let numbers = name
        .strip_prefix("adapter_model-")?
        .strip_suffix(".safetensors")?;
    let (number, total) = numbers.split_once("-of-")?;
    Some((number.parse().ok()?, total.parse().ok()?))
}
