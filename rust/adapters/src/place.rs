//! Where an adapter's files lie: a PEFT directory, or one file and what would be its config.

use std::path::{Path, PathBuf};

use crate::config::Config;
use crate::error::Result;
use crate::read::{locate, read_config};
use crate::weights::Weights;

/// Where an adapter's files lie.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// A PEFT directory.
    Directory(&'a Path),
    /// Weights in one safetensors file, and what would lie beside them as `adapter_config.json`.
    File {
        weights: &'a Path,
        config: &'a str,
        /// What errors call the file.
        name: &'a str,
    },
}

/// The directory, the config, the weights, and notes on where they were found.
pub(crate) fn open_files(place: Place<'_>) -> Result<(PathBuf, Config, Weights, Vec<String>)> {
    match place {
        Place::Directory(directory) => {
            let (directory, located) = locate(directory);
            let (path, text) = read_config(&directory)?;
            let config = Config::parse(&path, &text)?;
            let (weights, sharded) = Weights::open(&directory)?;
            let notes = located.into_iter().chain(sharded).collect();
            Ok((directory, config, weights, notes))
        }
        Place::File {
            weights,
            config,
            name,
        } => {
            let config = Config::parse(Path::new("the config given"), config)?;
            let weights = Weights::open_file(weights, name)?;
            Ok((name.into(), config, weights, Vec::new()))
        }
    }
}
