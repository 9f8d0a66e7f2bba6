//! Where an adapter lies, and its config: the text of `adapter_config.json`, within a bound.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::foreign::{self, CONFIG_FILE, Entries, Expected, recognise, recognise_file};

/// Weights other than the two files' that change what an adapter computes, and whose they are.
const OTHER_WEIGHTS: &[(&str, &str)] = &[
    ("new_embeddings.safetensors", "embeddings of added tokens"),
    ("new_embeddings.bin", "embeddings of added tokens"),
    ("non_lora_trainables.bin", "weights trained in full"),
];

/// Longest accepted config in bytes; real ones are a few kilobytes.
const MAX_CONFIG_NBYTES: u64 = 1 << 20;

/// The directory that holds the adapter given as `directory`, and a note where that is one below it.
///
/// Trainers leave checkpoints below their output: the only one is meant, of several none.
pub(crate) fn locate(directory: &Path) -> (PathBuf, Option<String>) {
    let entries = Entries::of(directory);
    if entries.has_files_of_an_adapter() {
        return (directory.into(), None);
    }
    match entries.adapters_below(directory)[..] {
        [only] => (
            directory.join(only),
            Some(format!(
                "read from {only:?}, the only adapter in the directory given"
            )),
        ),
        _ => (directory.into(), None),
    }
}

/// Checks that `directory` is one and returns its config's path and text.
pub(crate) fn read_config(directory: &Path) -> Result<(PathBuf, String)> {
    let metadata = fs::metadata(directory).map_err(|error| io_error(directory, error))?;
    if !metadata.is_dir() {
        return Err(Error::NotADirectory {
            path: directory.into(),
            reason: foreign::file_as_directory(directory),
        });
    }
    refuse_other_weights(directory)?;
    let path = directory.join(CONFIG_FILE);
    let nbytes =
        file_nbytes(&path).map_err(|error| say_what_is_there(directory, CONFIG_FILE, error))?;
    if nbytes > MAX_CONFIG_NBYTES {
        let reason = format!("it has {nbytes} bytes, limit is {MAX_CONFIG_NBYTES}");
        return Err(Error::ConfigSyntax { path, reason });
    }
    let text = fs::read_to_string(&path);
    let text = text.map_err(|error| match recognise_file(&path, Expected::Json) {
        Some(what) if error.kind() == ErrorKind::InvalidData => foreign(&path, what),
        _ => io_error(&path, error),
    })?;
    match recognise(text.as_bytes(), Expected::Json) {
        Some(what) => Err(foreign(&path, what)),
        None => Ok((path, text)),
    }
}

/// Weights beside the adapter's own would be left out without a word.
fn refuse_other_weights(directory: &Path) -> Result<()> {
    for (name, what) in OTHER_WEIGHTS {
        let path = directory.join(name);
        if path.exists() {
            return Err(Error::OtherWeights { path, what });
        }
    }
    Ok(())
}

pub(crate) fn file_nbytes(path: &Path) -> Result<u64> {
    let metadata = fs::metadata(path).map_err(|error| io_error(path, error))?;
    if !metadata.is_file() {
        return Err(Error::NotAFile { path: path.into() });
    }
    Ok(metadata.len())
}

/// A missing file, with what lies there instead.
pub(crate) fn say_what_is_there(directory: &Path, name: &str, error: Error) -> Error {
    match error {
        Error::Missing { path } => Error::Absent {
            path,
            instead: foreign::instead_of(name, directory),
        },
        other => other,
    }
}

pub(crate) fn foreign(path: &Path, what: String) -> Error {
    Error::Foreign {
        path: path.into(),
        what,
    }
}

pub(crate) fn io_error(path: &Path, error: io::Error) -> Error {
    let path = path.into();
    match error.kind() {
        ErrorKind::NotFound => Error::Missing { path },
        ErrorKind::InvalidData => Error::ConfigSyntax {
            path,
            reason: error.to_string(),
        },
        ErrorKind::UnexpectedEof => Error::Weights {
            path,
            reason: "it is truncated".into(),
        },
        _ => Error::Unreadable {
            path,
            source: error,
        },
    }
}
