//! NVIDIA's run-time compiler: CUDA C++ to machine code or PTX.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr;

use libloading::Library;

use super::error::{CudaError, Version};
use super::target::{Code, Target};

/// File names of the library, newest first.
const LIBRARIES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
const SUCCESS: c_int = 0;

/// The compiler, loaded for the rest of the process.
pub(super) struct Nvrtc {
    api: Api,
    pub version: Version,
    /// The library's file.
    pub path: PathBuf,
    /// Architectures it compiles for, 90 for `compute_90`, ascending.
    pub architectures: Vec<i32>,
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
    /// Loads libnvrtc from the first of `folders` that has a usable one, else from the library path.
    pub fn load(folders: &[PathBuf]) -> Result<Self, CudaError> {
        let beside = folders.iter().find_map(|folder| {
            let paths = LIBRARIES.iter().map(|name| folder.join(name));
            paths
                .filter(|path| path.exists())
                .find_map(|path| open(&path))
        });
        let found = beside.or_else(|| LIBRARIES.iter().find_map(|name| open(Path::new(name))));
        found.ok_or(CudaError::NoNvrtc)
    }

    /// A unit compiled for a target, or what the compiler said. PTX ends in NUL.
    pub fn compile(&self, unit: &Unit<'_>, target: Target) -> Result<Vec<u8>, String> {
        let program = Program::new(&self.api, unit)?;
        let compiled = program.compile(unit.options, target);
        compiled.map_err(|error| format!("{error}\n{}", program.log()))?;
        program.code(target.code)
    }
}

/// The library in a file or of a name, unless it can't be used. Before one in a folder its builtins are
/// loaded, which it opens by name.
fn open(path: &Path) -> Option<Nvrtc> {
    let folder = path.parent().filter(|folder| folder.is_absolute());
    folder.into_iter().flat_map(builtins).for_each(|path| {
        // SAFETY: loading runs the library's initialisers; libnvrtc's are NVIDIA's.
        let _ = unsafe { Library::new(path) }.map(std::mem::forget);
    });
    // SAFETY: as above.
    let library = unsafe { Library::new(path) }.ok()?;
    let api = Api::of(&library).ok()?;
    let nvrtc = Nvrtc {
        version: api.version().ok()?,
        architectures: api.architectures().ok()?,
        path: api.path(),
        api,
    };
    std::mem::forget(library);
    Some(nvrtc)
}

fn builtins(folder: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let is_builtins = |name: &str| name.starts_with("libnvrtc-builtins.so");
    entries
        .filter(move |entry| entry.file_name().to_str().is_some_and(is_builtins))
        .map(|entry| entry.path())
}

type RawProgram = *mut c_void;
type Texts = *const *const c_char;

/// The library's functions, as nvrtc.h declares them; each returns 0, or a number that `error_string` words.
#[derive(Clone, Copy)]
struct Api {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    num_supported_archs: unsafe extern "C" fn(*mut c_int) -> c_int,
    supported_archs: unsafe extern "C" fn(*mut c_int) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    create: unsafe extern "C" fn(
        *mut RawProgram,
        *const c_char,
        *const c_char,
        c_int,
        Texts,
        Texts,
    ) -> c_int,
    destroy: unsafe extern "C" fn(*mut RawProgram) -> c_int,
    compile: unsafe extern "C" fn(RawProgram, c_int, Texts) -> c_int,
    log_size: unsafe extern "C" fn(RawProgram, *mut usize) -> c_int,
    log: unsafe extern "C" fn(RawProgram, *mut c_char) -> c_int,
    ptx_size: unsafe extern "C" fn(RawProgram, *mut usize) -> c_int,
    ptx: unsafe extern "C" fn(RawProgram, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(RawProgram, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(RawProgram, *mut c_char) -> c_int,
}

impl Api {
    fn of(library: &Library) -> Result<Self, libloading::Error> {
        /// # Safety
        /// `name` has the type `F`.
        unsafe fn symbol<F: Copy>(library: &Library, name: &str) -> Result<F, libloading::Error> {
            // SAFETY: the caller's contract.
            Ok(*unsafe { library.get::<F>(name) }?)
        }
        // SAFETY: the functions have these types in nvrtc.h of CUDA 11.2 and later.
        unsafe {
            Ok(Self {
                version: symbol(library, "nvrtcVersion")?,
                num_supported_archs: symbol(library, "nvrtcGetNumSupportedArchs")?,
                supported_archs: symbol(library, "nvrtcGetSupportedArchs")?,
                error_string: symbol(library, "nvrtcGetErrorString")?,
                create: symbol(library, "nvrtcCreateProgram")?,
                destroy: symbol(library, "nvrtcDestroyProgram")?,
                compile: symbol(library, "nvrtcCompileProgram")?,
                log_size: symbol(library, "nvrtcGetProgramLogSize")?,
                log: symbol(library, "nvrtcGetProgramLog")?,
                ptx_size: symbol(library, "nvrtcGetPTXSize")?,
                ptx: symbol(library, "nvrtcGetPTX")?,
                cubin_size: symbol(library, "nvrtcGetCUBINSize")?,
                cubin: symbol(library, "nvrtcGetCUBIN")?,
            })
        }
    }

    fn check(&self, code: c_int) -> Result<(), String> {
        if code == SUCCESS {
            return Ok(());
        }
        // SAFETY: the text is a constant of the library.
        let text = unsafe { CStr::from_ptr((self.error_string)(code)) };
        Err(text.to_string_lossy().into_owned())
    }

    fn version(&self) -> Result<Version, String> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the pointers are to live integers.
        self.check(unsafe { (self.version)(&raw mut major, &raw mut minor) })?;
        Ok(Version { major, minor })
    }

    fn architectures(&self) -> Result<Vec<i32>, String> {
        let mut count = 0;
        // SAFETY: the pointer is to a live integer.
        self.check(unsafe { (self.num_supported_archs)(&raw mut count) })?;
        let mut architectures = vec![0; count as usize];
        // SAFETY: room for as many as NVRTC said.
        self.check(unsafe { (self.supported_archs)(architectures.as_mut_ptr()) })?;
        architectures.sort_unstable();
        Ok(architectures)
    }

    /// The file that the functions come from.
    fn path(&self) -> PathBuf {
        // SAFETY: pointers and numbers, for which zeros are values.
        let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
        let address = self.version as *const c_void;
        // SAFETY: `info` lives; the address is a function's.
        if unsafe { libc::dladdr(address, &raw mut info) } == 0 || info.dli_fname.is_null() {
            return PathBuf::from("libnvrtc");
        }
        // SAFETY: the name lives as long as the library, which is never unloaded.
        let name = unsafe { CStr::from_ptr(info.dli_fname) };
        PathBuf::from(name.to_string_lossy().into_owned())
    }

    /// What a pair of functions gives: one says how many bytes, the other writes them.
    ///
    /// # Safety
    /// Both are functions of this library for `program`, which lives.
    unsafe fn bytes(
        &self,
        program: RawProgram,
        size: unsafe extern "C" fn(RawProgram, *mut usize) -> c_int,
        get: unsafe extern "C" fn(RawProgram, *mut c_char) -> c_int,
    ) -> Result<Vec<u8>, String> {
        let mut nbytes = 0;
        // SAFETY: the caller's contract.
        self.check(unsafe { size(program, &raw mut nbytes) })?;
        let mut bytes = vec![0_u8; nbytes];
        // SAFETY: the caller's contract; room for as many bytes as NVRTC said.
        self.check(unsafe { get(program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

struct Program<'a> {
    api: &'a Api,
    raw: RawProgram,
    /// NVRTC may refer to the texts until the program is gone.
    _texts: Vec<CString>,
}

impl<'a> Program<'a> {
    fn new(api: &'a Api, unit: &Unit<'_>) -> Result<Self, String> {
        let mut texts = vec![c_string(unit.text), c_string(unit.file)];
        texts.extend(unit.headers.iter().map(|(_, header)| c_string(header)));
        texts.extend(unit.headers.iter().map(|(name, _)| c_string(name)));
        let pointers: Vec<*const c_char> = texts.iter().map(|text| text.as_ptr()).collect();
        let count = unit.headers.len();
        let (headers, names) = (&pointers[2..2 + count], &pointers[2 + count..]);
        let mut raw = ptr::null_mut();
        // SAFETY: every pointer is to a live C string, headers and names are `count` of them each.
        let created = unsafe {
            (api.create)(
                &raw mut raw,
                pointers[0],
                pointers[1],
                count as c_int,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        api.check(created)?;
        Ok(Self {
            api,
            raw,
            _texts: texts,
        })
    }

    fn compile(&self, options: &[String], target: Target) -> Result<(), String> {
        let architecture = c_string(&format!("-arch={target}"));
        let options: Vec<CString> = options.iter().map(|option| c_string(option)).collect();
        let texts = options.iter().chain([&architecture]);
        let pointers: Vec<*const c_char> = texts.map(|text| text.as_ptr()).collect();
        // SAFETY: the program lives, and so do the options.
        let compiled =
            unsafe { (self.api.compile)(self.raw, pointers.len() as c_int, pointers.as_ptr()) };
        self.api.check(compiled)
    }

    fn code(&self, code: Code) -> Result<Vec<u8>, String> {
        let (size, get) = match code {
            Code::Cubin => (self.api.cubin_size, self.api.cubin),
            Code::Ptx => (self.api.ptx_size, self.api.ptx),
        };
        // SAFETY: the program lives and is compiled.
        unsafe { self.api.bytes(self.raw, size, get) }
    }

    fn log(&self) -> String {
        // SAFETY: the program lives.
        let log = unsafe { self.api.bytes(self.raw, self.api.log_size, self.api.log) };
        let log = log.unwrap_or_default();
        let log = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy);
        log.map(|log| log.trim_end().to_owned()).unwrap_or_default()
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: created in `new`, destroyed once.
        let _ = unsafe { (self.api.destroy)(&raw mut self.raw) };
    }
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("sources and options hold no NUL")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PTX: Target = Target {
        code: Code::Ptx,
        architecture: 80,
    };

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
        let log = nvrtc.compile(&unit("int x = nonsense;", &[]), PTX);
        let log = log.unwrap_err();
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
        let ptx = String::from_utf8(nvrtc.compile(&unit, PTX).unwrap()).unwrap();
        assert!(ptx.contains(".entry kernel("), "{ptx}");
        assert!(ptx.ends_with('\0'));
    }

    #[test]
    fn machine_code_is_an_elf_file_for_the_architecture() {
        let Some(nvrtc) = nvrtc() else { return };
        let unit = unit("extern \"C\" __global__ void kernel() {}", &[]);
        let cubin = |architecture| {
            let code = Code::Cubin;
            let cubin = nvrtc.compile(&unit, Target { code, architecture });
            cubin.unwrap()
        };
        assert!(cubin(80).starts_with(b"\x7fELF"));
        assert_ne!(cubin(80), cubin(90));
    }

    #[test]
    fn the_library_in_a_named_folder_is_the_one_that_is_used() {
        let Some(folder) = std::env::var_os("LORASERVE_TEST_NVRTC") else {
            return;
        };
        let nvrtc = Nvrtc::load(&["/nowhere".into(), folder.clone().into()]).unwrap();
        assert_eq!(nvrtc.path.parent().unwrap(), Path::new(&folder));
    }
}
