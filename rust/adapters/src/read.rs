//! The two files of a PEFT directory; nothing is read beyond what their headers promise.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};

use crate::error::{Error, Result};
use crate::foreign::{self, CONFIG_FILE, Expected, WEIGHTS_FILE, recognise, recognise_file};

/// Weights other than the two files' that change what an adapter computes, and whose they are.
const OTHER_WEIGHTS: &[(&str, &str)] = &[
    ("new_embeddings.safetensors", "embeddings of added tokens"),
    ("new_embeddings.bin", "embeddings of added tokens"),
    ("non_lora_trainables.bin", "weights trained in full"),
];

/// Longest accepted config in bytes; real ones are a few kilobytes.
const MAX_CONFIG_NBYTES: u64 = 1 << 20;
/// Longest accepted safetensors header in bytes, far above any adapter's.
const MAX_HEADER_NBYTES: u64 = 16 << 20;
/// A safetensors file opens with its header's length, a little-endian u64.
const LENGTH_NBYTES: u64 = 8;

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

/// An open `adapter_model.safetensors` whose header agrees with its length.
pub(crate) struct WeightsFile {
    path: PathBuf,
    file: File,
    /// Bytes before the first tensor's data.
    data_start: u64,
    header: Metadata,
}

impl WeightsFile {
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        let path = directory.join(WEIGHTS_FILE);
        let nbytes = file_nbytes(&path)
            .map_err(|error| say_what_is_there(directory, WEIGHTS_FILE, error))?;
        let mut file = File::open(&path).map_err(|error| io_error(&path, error))?;
        let opened = read_header_length(&path, &mut file, nbytes).and_then(|header_nbytes| {
            let header = read_header(&path, &mut file, header_nbytes)?;
            Ok((header_nbytes, header))
        });
        let (header_nbytes, header) = opened.map_err(|error| {
            recognise_file(&path, Expected::Binary).map_or(error, |what| foreign(&path, what))
        })?;
        let data_start = LENGTH_NBYTES + header_nbytes;
        let expected = data_start.checked_add(header.data_len() as u64);
        if expected != Some(nbytes) {
            let expected = expected.map_or_else(|| "more".into(), |expected| expected.to_string());
            let reason = format!("it has {nbytes} bytes, its header promises {expected}");
            return Err(Error::Weights { path, reason });
        }
        Ok(Self {
            path,
            file,
            data_start,
            header,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn tensors(&self) -> BTreeMap<String, TensorInfo> {
        let tensors = self.header.tensors().into_iter();
        tensors.map(|(name, info)| (name, info.clone())).collect()
    }

    /// Reads the bytes of one tensor into `buffer`, which grows to the largest and is meant to be
    /// used again: fresh memory would cost a page fault every 4 KiB.
    pub(crate) fn read<'a>(
        &mut self,
        info: &TensorInfo,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        let (start, end) = info.data_offsets;
        buffer.resize(buffer.len().max(end - start), 0);
        let bytes = &mut buffer[..end - start];
        let position = SeekFrom::Start(self.data_start + start as u64);
        let read = self
            .file
            .seek(position)
            .and_then(|_| self.file.read_exact(bytes));
        read.map_err(|error| io_error(&self.path, error))?;
        Ok(bytes)
    }
}

fn read_header_length(path: &Path, file: &mut File, nbytes: u64) -> Result<u64> {
    let mut length = [0; LENGTH_NBYTES as usize];
    let weights = |reason: String| Error::Weights {
        path: path.into(),
        reason,
    };
    if nbytes < LENGTH_NBYTES {
        return Err(weights(format!(
            "it has {nbytes} bytes, a header needs {LENGTH_NBYTES}"
        )));
    }
    file.read_exact(&mut length)
        .map_err(|error| io_error(path, error))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_NBYTES {
        return Err(weights(format!(
            "header of {length} bytes, limit is {MAX_HEADER_NBYTES}"
        )));
    }
    if length > nbytes - LENGTH_NBYTES {
        return Err(weights(format!(
            "header of {length} bytes in a file of {nbytes}: truncated"
        )));
    }
    Ok(length)
}

fn read_header(path: &Path, file: &mut File, nbytes: u64) -> Result<Metadata> {
    let mut header = vec![0; nbytes as usize];
    file.read_exact(&mut header)
        .map_err(|error| io_error(path, error))?;
    serde_json::from_slice(&header).map_err(|error| {
        let reason = format!("bad header: {error}");
        Error::Weights {
            path: path.into(),
            reason,
        }
    })
}

fn file_nbytes(path: &Path) -> Result<u64> {
    let metadata = fs::metadata(path).map_err(|error| io_error(path, error))?;
    if !metadata.is_file() {
        return Err(Error::NotAFile { path: path.into() });
    }
    Ok(metadata.len())
}

/// A missing file, with what lies there instead.
fn say_what_is_there(directory: &Path, name: &str, error: Error) -> Error {
    match error {
        Error::Missing { path } => Error::Absent {
            path,
            instead: foreign::instead_of(name, directory),
        },
        other => other,
    }
}

fn foreign(path: &Path, what: String) -> Error {
    Error::Foreign {
        path: path.into(),
        what,
    }
}

fn io_error(path: &Path, error: io::Error) -> Error {
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
