//! Compiled kernels on disk: a second start compiles nothing.
//!
//! An entry is a file `<key>.cubin` or `<key>.ptx`: a comment with the SHA-256 of what follows, then the code.
//! A file that is damaged counts as absent. Any number of processes share a folder.

use std::env;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process;

use sha2::{Digest, Sha256};

/// A folder of compiled kernels, or none where no place can be named.
#[derive(Clone, Debug)]
pub(super) struct KernelCache {
    folder: Option<PathBuf>,
}

impl KernelCache {
    /// The folder `$LORASERVE_CACHE_DIR`, else `loraserve` in `$XDG_CACHE_HOME` or `~/.cache`.
    pub fn from_environment() -> Self {
        let set = |name| env::var_os(name).filter(|value| !value.is_empty());
        let user = || {
            let home = set("HOME").map(|home| Path::new(&home).join(".cache"));
            let base = set("XDG_CACHE_HOME").map(PathBuf::from).or(home)?;
            Some(base.join("loraserve"))
        };
        let folder = set("LORASERVE_CACHE_DIR").map(PathBuf::from).or_else(user);
        Self {
            folder: folder.map(|folder| folder.join("kernels")),
        }
    }

    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// What was stored under `key`, with the extension of its form, if it is whole.
    pub fn get(&self, key: &str, extension: &str) -> Option<Vec<u8>> {
        let entry = fs::read(self.path(key, extension)?).ok()?;
        let end = entry.iter().position(|&byte| byte == b'\n')? + 1;
        let (header, code) = entry.split_at(end);
        (header == self::header(code).as_bytes()).then(|| code.to_vec())
    }

    /// Stores an entry; a folder that can't be written costs the next start a compilation, no more.
    pub fn put(&self, key: &str, extension: &str, code: &[u8]) {
        let Some(path) = self.path(key, extension) else {
            return;
        };
        let partial = path.with_extension(format!("{extension}.{}.partial", process::id()));
        let entry = [header(code).as_bytes(), code].concat();
        let write = || {
            fs::create_dir_all(path.parent().expect("an entry lies in a folder"))?;
            fs::write(&partial, entry)?;
            fs::rename(&partial, &path)
        };
        if write().is_err() {
            let _ = fs::remove_file(&partial);
        }
    }

    fn path(&self, key: &str, extension: &str) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(format!("{key}.{extension}")))
    }
}

fn header(code: &[u8]) -> String {
    format!("// sha256 {}\n", digest([code]))
}

/// SHA-256 of parts, each with its length, in hex.
pub(super) fn digest<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let mut hex = String::new();
    for byte in hash.finalize() {
        write!(hex, "{byte:02x}").expect("a String takes any text");
    }
    hex
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(folder: &Path) -> KernelCache {
        KernelCache {
            folder: Some(folder.join("kernels")),
        }
    }

    #[test]
    fn what_was_stored_is_found_again() {
        let folder = tempfile::tempdir().unwrap();
        cache(folder.path()).put("key", "ptx", b"some\nptx\0");
        assert_eq!(
            cache(folder.path()).get("key", "ptx").unwrap(),
            b"some\nptx\0"
        );
        assert_eq!(cache(folder.path()).get("other", "ptx"), None);
        assert_eq!(cache(folder.path()).get("key", "cubin"), None);
        let names = fs::read_dir(folder.path().join("kernels")).unwrap();
        assert_eq!(names.count(), 1, "no partial file stays");
    }

    #[test]
    fn damaged_entries_count_as_absent() {
        let folder = tempfile::tempdir().unwrap();
        let cache = cache(folder.path());
        cache.put("key", "ptx", b"some ptx");
        let path = cache.path("key", "ptx").unwrap();
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for damaged in [&whole[..whole.len() - 1], &whole[..10], b"", &flipped] {
            fs::write(&path, damaged).unwrap();
            assert_eq!(cache.get("key", "ptx"), None);
        }
    }

    #[test]
    fn a_folder_that_can_not_be_written_is_no_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let cache = cache(&file);
        cache.put("key", "ptx", b"ptx");
        assert_eq!(cache.get("key", "ptx"), None);
    }

    #[test]
    fn parts_are_told_apart_by_their_length() {
        assert_ne!(
            digest([&b"ab"[..], &b"c"[..]]),
            digest([&b"a"[..], &b"bc"[..]])
        );
    }
}
