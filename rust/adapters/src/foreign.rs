//! What people hand over in place of an adapter's or a model's files: told by first bytes or by what lies
//! around, and said with the remedy.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

/// The two files of a PEFT directory.
pub(crate) const CONFIG_FILE: &str = "adapter_config.json";
pub(crate) const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// Bytes looked at: a tar archive names itself at byte 257.
const HEAD_NBYTES: usize = 512;
/// Entries of a directory that are looked at.
const MAX_ENTRIES: usize = 4096;
/// Names quoted from a directory.
const MAX_QUOTED: usize = 5;
/// Characters quoted from a text.
const QUOTE_CHARS: usize = 40;

const AGAIN: &str = "get the file itself again";
const FROM_PEFT: &str = "hand over the PEFT directory it was made from";

/// First bytes, what they begin, and what to do.
const MAGIC: &[(&[u8], &str, &str)] = &[
    (
        b"version https://git-lfs",
        "a git-lfs pointer, not the file it stands for",
        "run 'git lfs pull' where it was cloned, or download it from the Hub",
    ),
    (
        b"# xet version",
        "a Xet pointer, not the file it stands for",
        "download it from the Hub",
    ),
    (b"GGUF", "a GGUF file", FROM_PEFT),
    (b"\x93NUMPY", "a NumPy array", FROM_PEFT),
    (b"\x89HDF", "an HDF5 file", FROM_PEFT),
    (b"\x1f\x8b\x08", "a gzip archive", "unpack it"),
    (b"BZh", "a bzip2 archive", "unpack it"),
    (b"\xfd7zXZ", "an xz archive", "unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"Rar!", "a rar archive", "unpack it"),
    (b"\xff\xfe", "text in UTF-16", "save it as UTF-8"),
    (
        b"\xef\xbb\xbf",
        "text that begins with a byte order mark",
        "save it as UTF-8 without one",
    ),
];

/// What a file should have been: a text may begin like one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    Binary,
    Json,
}

/// What the file at `path` is instead, in words that follow "it is", with the remedy; none if that can't
/// be told.
pub fn recognise_file(path: &Path, expected: Expected) -> Option<String> {
    let mut head = Vec::new();
    let file = File::open(path).ok()?;
    file.take(HEAD_NBYTES as u64).read_to_end(&mut head).ok()?;
    recognise(&head, expected)
}

/// As `recognise_file`, of a file's first bytes.
pub fn recognise(head: &[u8], expected: Expected) -> Option<String> {
    let head = &head[..head.len().min(HEAD_NBYTES)];
    if head.is_empty() {
        return Some(format!("empty: {AGAIN}, a copy or download was cut short"));
    }
    if let Some((_, what, remedy)) = MAGIC.iter().find(|(magic, ..)| head.starts_with(magic)) {
        return Some(format!("{what}: {remedy}"));
    }
    if head.starts_with(b"PK\x03\x04") {
        return Some(zip(head));
    }
    if head.get(257..262) == Some(b"ustar") {
        return Some("a tar archive: unpack it".into());
    }
    if matches!(head, [0x80, 2..=5, ..]) {
        return Some(pickle());
    }
    text(head, expected)
}

/// `torch.save` writes a zip archive whose first entry is `<name>/data.pkl`.
fn zip(head: &[u8]) -> String {
    let is_pickle = head.windows(8).any(|window| window == b"data.pkl");
    if is_pickle {
        pickle()
    } else {
        "a zip archive: unpack it".into()
    }
}

fn pickle() -> String {
    "a pickle, which is not loaded: convert to safetensors".into()
}

/// Error pages and messages that a download saved under the file's name.
fn text(head: &[u8], expected: Expected) -> Option<String> {
    let cut = head.len() == HEAD_NBYTES;
    let text = match str::from_utf8(head) {
        Ok(text) => text,
        Err(error) if cut && error.error_len().is_none() => {
            str::from_utf8(&head[..error.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    let is_text = |c: char| !c.is_control() || c.is_ascii_whitespace();
    let start = text.trim_start();
    if !text.chars().all(is_text) || start.is_empty() {
        return None;
    }
    let lower = start.to_ascii_lowercase();
    if lower.starts_with("<!doctype html") || lower.starts_with("<html") {
        return Some(format!(
            "an HTML page that a download saved under this name: {AGAIN}, with a login where it needs one"
        ));
    }
    if expected == Expected::Json && start.starts_with(['{', '[', '"']) {
        return None;
    }
    let quoted: String = start.chars().take(QUOTE_CHARS).collect();
    Some(format!("text that begins with {quoted:?}: {AGAIN}"))
}

/// Why a file given as an adapter is none.
pub(crate) fn file_as_directory(path: &Path) -> String {
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension {
        Some("safetensors" | "json" | "bin" | "pt" | "pth") => {
            "give the directory that holds it".into()
        }
        _ => match recognise_file(path, Expected::Binary) {
            Some(what) => format!("it is {what}"),
            None => format!("an adapter is a directory with {CONFIG_FILE} and {WEIGHTS_FILE}"),
        },
    }
}

/// What lies in `directory` where `missing`, one of an adapter's two files, should: in words, with the
/// remedy.
pub(crate) fn instead_of(missing: &str, directory: &Path) -> String {
    let entries = Entries::of(directory);
    entries
        .misspelt(missing)
        .or_else(|| entries.below(directory))
        .or_else(|| entries.pickled())
        .or_else(|| entries.foreign())
        .or_else(|| entries.whole_model())
        .unwrap_or_else(|| entries.quoted())
}

/// Names in a directory, ascending.
pub(crate) struct Entries {
    files: Vec<String>,
    directories: Vec<String>,
}

impl Entries {
    pub(crate) fn of(directory: &Path) -> Self {
        let (mut files, mut directories) = (Vec::new(), Vec::new());
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        for entry in entries.take(MAX_ENTRIES) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let is_directory = entry.path().is_dir();
            if is_directory {
                &mut directories
            } else {
                &mut files
            }
            .push(name);
        }
        files.sort();
        directories.sort();
        Self { files, directories }
    }

    pub(crate) fn files(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(String::as_str)
    }

    /// Whether an adapter, or a part of one, lies in the directory itself.
    pub(crate) fn has_files_of_an_adapter(&self) -> bool {
        let is_of_one = |file: &str| file.starts_with("adapter_") || file.ends_with(".safetensors");
        self.files().any(is_of_one)
    }

    /// Names of directories in `directory` that hold an adapter, those of the last steps last; a link may lead
    /// anywhere, and is not followed.
    pub(crate) fn adapters_below(&self, directory: &Path) -> Vec<&str> {
        let has_adapter = |name: &&str| {
            let path = directory.join(name);
            !path.is_symlink() && path.join(CONFIG_FILE).is_file()
        };
        let directories = self.directories.iter().map(String::as_str);
        let mut adapters: Vec<_> = directories.filter(has_adapter).collect();
        adapters.sort_by_key(|name| step_of(name));
        adapters
    }

    fn has(&self, name: &str) -> bool {
        self.files.iter().any(|file| file == name)
    }

    fn ending(&self, ends: &[&str]) -> Option<&str> {
        let is_one = |file: &&String| {
            let lower = file.to_ascii_lowercase();
            ends.iter().any(|end| lower.ends_with(end))
        };
        self.files.iter().find(is_one).map(String::as_str)
    }

    fn misspelt(&self, missing: &str) -> Option<String> {
        let is_it = |file: &&String| file.eq_ignore_ascii_case(missing);
        let found = self.files.iter().find(is_it)?;
        Some(format!("{found:?} lies there, rename it to {missing:?}"))
    }

    /// Trainers leave checkpoints below their output, PEFT puts an adapter with a name of its own there.
    fn below(&self, directory: &Path) -> Option<String> {
        let adapters = self.adapters_below(directory);
        let last = adapters.last()?;
        let listed = adapters.iter().rev().take(MAX_QUOTED);
        let listed: Vec<_> = listed.map(|name| format!("{name}/")).collect();
        Some(format!(
            "adapters lie below it in {}: give one of those directories, such as {}",
            listed.join(", "),
            directory.join(last).display()
        ))
    }

    fn pickled(&self) -> Option<String> {
        let ends = [
            "adapter_model.bin",
            "adapter_model.pt",
            "adapter_model.pth",
            "adapter_model.bin.index.json",
        ];
        let found = self.ending(&ends)?;
        Some(format!(
            "{found}: pickle files are not loaded; convert to safetensors, with \
             safetensors.torch.save_file(torch.load({found:?}, weights_only=True), {WEIGHTS_FILE:?})"
        ))
    }

    fn foreign(&self) -> Option<String> {
        let kinds: &[(&[&str], &str)] = &[
            (
                &[".gguf"],
                "a GGUF file: give that file itself as the adapter",
            ),
            (
                &[".npy"],
                "of TensorRT-LLM's form of an adapter: give a directory with its two arrays and no \
                 adapter_config.json",
            ),
            (
                &[".nemo"],
                "NeMo's form of an adapter, which is not read: hand over the PEFT directory it was made from",
            ),
            (
                &["adapters.safetensors", "adapters.npz"],
                "MLX's form of an adapter, which is not read: hand over the PEFT directory it was made from",
            ),
        ];
        for (ends, what) in kinds {
            if let Some(found) = self.ending(ends) {
                return Some(format!("{found:?} is {what}"));
            }
        }
        let archive = self.ending(&[".zip", ".tar", ".gz", ".tgz", ".xz", ".zst", ".7z"])?;
        Some(format!("{archive:?} is an archive: unpack it"))
    }

    fn whole_model(&self) -> Option<String> {
        let weights = self.ending(&[
            "model.safetensors",
            "model.safetensors.index.json",
            "pytorch_model.bin",
        ]);
        let found = if self.has("config.json") {
            Some("config.json")
        } else {
            weights
        };
        Some(format!(
            "{:?} is of a whole model, not of an adapter: a full fine-tune is served as the model itself, \
             a LoRA is saved with PeftModel.save_pretrained",
            found?
        ))
    }

    fn quoted(&self) -> String {
        let names = self.files.iter().chain(&self.directories);
        let quoted: Vec<_> = names
            .take(MAX_QUOTED)
            .map(|name| format!("{name:?}"))
            .collect();
        let total = self.files.len() + self.directories.len();
        match total {
            0 => "the directory is empty".into(),
            _ if total > MAX_QUOTED => {
                format!(
                    "it holds {} and {} more",
                    quoted.join(", "),
                    total - MAX_QUOTED
                )
            }
            _ => format!("it holds {}", quoted.join(", ")),
        }
    }
}

/// The number a checkpoint's name ends in, so that the last comes last.
fn step_of(name: &str) -> (u64, &str) {
    let digits = name.rsplit('-').next().unwrap_or_default();
    (digits.parse().unwrap_or(0), name)
}
