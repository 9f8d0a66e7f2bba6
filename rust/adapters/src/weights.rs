//! An adapter's weights: safetensors files, opened by their headers, read a tensor at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};

use crate::error::{Error, Result};
use crate::foreign::{Expected, WEIGHTS_FILE, recognise_file};
use crate::read::{file_nbytes, foreign, io_error, say_what_is_there};
use crate::shards::Shards;

/// Longest accepted safetensors header in bytes, far above any adapter's; of all shards together.
const MAX_HEADER_NBYTES: u64 = 16 << 20;
/// A safetensors file opens with its header's length, a little-endian u64.
const LENGTH_NBYTES: u64 = 8;

/// A tensor as it is in the files: its name and where it lies.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) name: String,
    pub(crate) info: TensorInfo,
    /// Which of the files has it.
    pub(crate) shard: usize,
}

/// The open files of one adapter: one, or all its shards.
pub(crate) struct Weights {
    /// The file, or the first shard; for errors.
    path: PathBuf,
    shards: Vec<WeightsFile>,
}

impl Weights {
    /// Opens what `directory` has, and says in a note if those are shards.
    pub(crate) fn open(directory: &Path) -> Result<(Self, Option<String>)> {
        let path = directory.join(WEIGHTS_FILE);
        let shards = if path.exists() {
            None
        } else {
            Shards::find(directory)?
        };
        let Some(shards) = shards else {
            let file = WeightsFile::open(&path, &path, &mut MAX_HEADER_NBYTES.clone());
            let file = file.map_err(|error| say_what_is_there(directory, WEIGHTS_FILE, error))?;
            return Ok((
                Self {
                    path,
                    shards: vec![file],
                },
                None,
            ));
        };
        let mut left = MAX_HEADER_NBYTES;
        let open = |path: &PathBuf| WeightsFile::open(path, path, &mut left);
        let files = shards.files.iter().map(open).collect::<Result<Vec<_>>>()?;
        let weights = Self {
            path: shards.files[0].clone(),
            shards: files,
        };
        let sources = weights.sources()?;
        let numbers = sources
            .iter()
            .map(|(name, source)| (name.as_str(), source.shard));
        shards.check(&numbers.collect())?;
        let note = format!("weights: {} shards read as one file", weights.shards.len());
        Ok((weights, Some(note)))
    }

    /// Opens the file at `path`, which errors call `name`.
    pub(crate) fn open_file(path: &Path, name: &str) -> Result<Self> {
        let name = Path::new(name);
        let file = WeightsFile::open(path, name, &mut MAX_HEADER_NBYTES.clone())?;
        Ok(Self {
            path: name.into(),
            shards: vec![file],
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Every tensor by its name.
    pub(crate) fn sources(&self) -> Result<BTreeMap<String, Source>> {
        let mut sources = BTreeMap::new();
        for (shard, file) in self.shards.iter().enumerate() {
            for (name, info) in file.header.tensors() {
                let info = info.clone();
                let source = Source {
                    name: name.clone(),
                    info,
                    shard,
                };
                if sources.insert(name.clone(), source).is_some() {
                    return Err(Error::Duplicate {
                        first: name.clone(),
                        second: name,
                    });
                }
            }
        }
        Ok(sources)
    }

    /// Reads the bytes of one tensor into `buffer`, which grows to the largest and is meant to be
    /// used again: fresh memory would cost a page fault every 4 KiB.
    pub(crate) fn read<'a>(
        &mut self,
        source: &Source,
        buffer: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        self.shards[source.shard].read(&source.info, buffer)
    }
}

/// An open safetensors file whose header agrees with its length.
struct WeightsFile {
    path: PathBuf,
    file: File,
    /// Bytes before the first tensor's data.
    data_start: u64,
    header: Metadata,
}

impl WeightsFile {
    /// Opens the file at `place`, which errors call `path`; its header counts towards what is left of
    /// headers, `left_nbytes`.
    fn open(place: &Path, path: &Path, left_nbytes: &mut u64) -> Result<Self> {
        let nbytes = file_nbytes(place)?;
        let mut file = File::open(place).map_err(|error| io_error(path, error))?;
        let opened = read_header_length(path, &mut file, nbytes).and_then(|header_nbytes| {
            take_header(path, header_nbytes, left_nbytes)?;
            let header = read_header(path, &mut file, header_nbytes)?;
            Ok((header_nbytes, header))
        });
        let (header_nbytes, header) = opened.map_err(|error| {
            recognise_file(place, Expected::Binary).map_or(error, |what| foreign(path, what))
        })?;
        let data_start = LENGTH_NBYTES + header_nbytes;
        let expected = data_start.checked_add(header.data_len() as u64);
        if expected != Some(nbytes) {
            let expected = expected.map_or_else(|| "more".into(), |expected| expected.to_string());
            let reason = format!("it has {nbytes} bytes, its header promises {expected}");
            return Err(Error::Weights {
                path: path.into(),
                reason,
            });
        }
        Ok(Self {
            path: path.into(),
            file,
            data_start,
            header,
        })
    }

    fn read<'a>(&mut self, info: &TensorInfo, buffer: &'a mut Vec<u8>) -> Result<&'a [u8]> {
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
        return Err(weights(header_limit(length)));
    }
    if length > nbytes - LENGTH_NBYTES {
        return Err(weights(format!(
            "header of {length} bytes in a file of {nbytes}: truncated"
        )));
    }
    Ok(length)
}

/// Headers of many shards may not take more than that of one file.
fn take_header(path: &Path, nbytes: u64, left_nbytes: &mut u64) -> Result<()> {
    match left_nbytes.checked_sub(nbytes) {
        Some(left) => {
            *left_nbytes = left;
            Ok(())
        }
        None => Err(Error::Weights {
            path: path.into(),
            reason: format!("{}, of all shards", header_limit(nbytes)),
        }),
    }
}

fn header_limit(nbytes: u64) -> String {
    format!("header of {nbytes} bytes, limit is {MAX_HEADER_NBYTES}")
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
