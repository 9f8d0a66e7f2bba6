//! NVIDIA's run-time compiler: CUDA C++ to PTX.

use std::ffi::{CStr, CString, c_char, c_int};
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr;

use cudarc::nvrtc::result;
use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};

use super::error::{CudaError, Version};

/// File names of the library, newest first.
const LIBRARIES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so.12"];

/// The compiler, loaded.
#[derive(Clone, Debug)]
pub(super) struct Nvrtc {
    pub version: Version,
    /// Architectures it compiles for, 90 for `compute_90`, ascending.
    architectures: Vec<i32>,
}

/// A translation unit to compile.
pub(super) struct Unit<'a> {
    pub file: &'static str,
    pub text: &'a str,
    /// (name in `#include`, text).
    pub headers: &'a [(&'a str, &'a str)],
    pub options: &'a [String],
}

impl Nvrtc {
    /// Loads libnvrtc from one of `folders`, else from the library path.
    pub fn load(folders: &[PathBuf]) -> Result<Self, CudaError> {
        preload(folders);
        // SAFETY: loading runs the library's initialisers; libnvrtc's are NVIDIA's.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoNvrtc);
        }
        Self::describe().map_err(|_| CudaError::NoNvrtc)
    }

    fn describe() -> Result<Self, result::NvrtcError> {
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: the pointers are to live integers.
        unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result()?;
        // SAFETY: as above.
        unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) }.result()?;
        let mut architectures = vec![0; count as usize];
        // SAFETY: room for as many as NVRTC said.
        unsafe { sys::nvrtcGetSupportedArchs(architectures.as_mut_ptr()) }.result()?;
        architectures.sort_unstable();
        Ok(Self {
            version: Version { major, minor },
            architectures,
        })
    }

    /// The newest architecture it knows that a device of this capability runs, as an option names it.
    pub fn architecture(&self, (major, minor): (i32, i32)) -> Option<String> {
        let device = major * 10 + minor;
        let known = self.architectures.iter().rev();
        let best = known.copied().find(|&known| known <= device)?;
        Some(format!("compute_{best}"))
    }

    /// PTX of a unit, or what the compiler said.
    #[expect(
        clippy::unused_self,
        reason = "there is a compiler only once it is loaded"
    )]
    pub fn compile(&self, unit: &Unit<'_>) -> Result<Vec<u8>, String> {
        let program = Program::new(unit).map_err(|error| error.to_string())?;
        // SAFETY: the program lives.
        let compiled = unsafe { result::compile_program(program.raw, unit.options) };
        compiled.map_err(|error| format!("{error}\n{}", program.log()))?;
        // SAFETY: the program lives and is compiled.
        let ptx = unsafe { result::get_ptx(program.raw) }.map_err(|error| error.to_string())?;
        Ok(bytes(&ptx))
    }
}

/// Loads the library from a folder for the rest of the process, so that its name finds it; before it
/// its builtins, which it opens by name too.
fn preload(folders: &[PathBuf]) {
    for folder in folders {
        for name in LIBRARIES {
            let path = folder.join(name);
            if path.exists() {
                builtins(folder).for_each(|path| {
                    keep_loaded(&path);
                });
                if keep_loaded(&path) {
                    return;
                }
            }
        }
    }
}

fn builtins(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_builtins = |name: &str| name.starts_with("libnvrtc-builtins.so");
    entries
        .filter(move |entry| entry.file_name().to_str().is_some_and(is_builtins))
        .map(|entry| entry.path())
}

fn keep_loaded(path: &Path) -> bool {
    // SAFETY: loading runs the library's initialisers; libnvrtc's are NVIDIA's.
    let library = unsafe { libloading::Library::new(path) };
    library.map(std::mem::forget).is_ok()
}

struct Program {
    raw: nvrtcProgram,
    /// NVRTC may refer to the texts until the program is gone.
    _texts: Vec<CString>,
}

impl Program {
    fn new(unit: &Unit<'_>) -> Result<Self, result::NvrtcError> {
        let text = |text: &str| CString::new(text).expect("sources hold no NUL");
        let mut texts = vec![text(unit.text), text(unit.file)];
        texts.extend(unit.headers.iter().map(|(_, header)| text(header)));
        texts.extend(unit.headers.iter().map(|(name, _)| text(name)));
        let pointers: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
        let count = unit.headers.len();
        let (headers, names) = (&pointers[2..2 + count], &pointers[2 + count..]);
        let mut raw = ptr::null_mut();
        // SAFETY: every pointer is to a live C string, headers and names are `count` of them each.
        let created: nvrtcResult = unsafe {
            sys::nvrtcCreateProgram(
                &raw mut raw,
                pointers[0],
                pointers[1],
                count as c_int,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        created.result()?;
        Ok(Self { raw, _texts: texts })
    }

    fn log(&self) -> String {
        // SAFETY: the program lives.
        let log = unsafe { result::get_program_log(self.raw) };
        let log = log.map(|log| bytes(&log)).unwrap_or_default();
        let log = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy);
        log.map(|log| log.trim_end().to_owned()).unwrap_or_default()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        let _ = unsafe { result::destroy_program(self.raw) };
    }
}

fn bytes(chars: &[c_char]) -> Vec<u8> {
    chars.iter().map(|&char| char as u8).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The compiler in the folder that `LORASERVE_TEST_NVRTC` names; tests pass over it where it names none.
    fn nvrtc() -> Option<Nvrtc> {
        let Some(folder) = std::env::var_os("LORASERVE_TEST_NVRTC") else {
            eprintln!("not tested: LORASERVE_TEST_NVRTC names no folder with libnvrtc");
            return None;
        };
        Some(Nvrtc::load(&[folder.into()]).unwrap())
    }

    fn unit<'a>(text: &'a str, headers: &'a [(&'a str, &'a str)]) -> Unit<'a> {
        Unit {
            file: "test.cu",
            text,
            headers,
            options: &[],
        }
    }

    #[test]
    fn errors_are_told_with_the_compilers_log() {
        let Some(nvrtc) = nvrtc() else { return };
        let log = nvrtc.compile(&unit("int x = nonsense;", &[])).unwrap_err();
        assert!(log.contains("test.cu(1): error"), "{log}");
        assert!(log.contains("nonsense"), "{log}");
    }

    #[test]
    fn headers_are_found_by_name_and_options_are_taken() {
        let Some(nvrtc) = nvrtc() else { return };
        let headers = [
            ("a.cuh", "#include \"b.cuh\""),
            ("b.cuh", "using T = TYPE;"),
        ];
        let text = "#include \"a.cuh\"\nextern \"C\" __global__ void kernel(T* x) { *x = 1; }";
        let options = ["-DTYPE=float".to_owned()];
        let unit = Unit {
            options: &options,
            ..unit(text, &headers)
        };
        let ptx = String::from_utf8(nvrtc.compile(&unit).unwrap()).unwrap();
        assert!(ptx.contains(".entry kernel("), "{ptx}");
        assert!(ptx.ends_with('\0'));
    }

    #[test]
    fn the_newest_architecture_a_device_runs_is_chosen() {
        let nvrtc = Nvrtc {
            version: Version {
                major: 13,
                minor: 0,
            },
            architectures: vec![75, 80, 86, 90, 120],
        };
        for (capability, expected) in [
            ((8, 0), Some("compute_80")),
            ((8, 9), Some("compute_86")),
            ((10, 0), Some("compute_90")),
            ((13, 1), Some("compute_120")),
            ((7, 0), None),
        ] {
            assert_eq!(nvrtc.architecture(capability).as_deref(), expected);
        }
    }
}
