//! NVRTC, loaded at run time: CUDA C++ in, a cubin out.

#![allow(unsafe_code, reason = "calls into a shared library")]

use std::ffi::{CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::ptr;

use libloading::Library;

use super::error::CudaError;

/// A compiler of one version.
pub struct Nvrtc {
    library: Library,
    path: PathBuf,
    /// `13.0`, …
    pub version: String,
}

type Program = *mut std::ffi::c_void;
type OfProgram<T> = unsafe extern "C" fn(Program, *mut T) -> c_int;
type Create = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;
type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;

/// Where the library may be, in the order tried.
fn candidates() -> Vec<PathBuf> {
    if let Some(path) = std::env::var_os("PODIUM_NVRTC") {
        return vec![PathBuf::from(path)];
    }
    let names = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];
    let folders = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(std::env::var_os)
        .map(|home| PathBuf::from(home).join("lib64"))
        .chain([PathBuf::from("/usr/local/cuda/lib64")]);
    names
        .iter()
        .map(PathBuf::from)
        .chain(folders.flat_map(|folder| names.map(|name| folder.join(name))))
        .collect()
}

impl Nvrtc {
    /// Finds the library: `PODIUM_NVRTC`, the loader's path, `CUDA_HOME`, `/usr/local/cuda`.
    ///
    /// # Errors
    /// None is found, or it is no NVRTC.
    pub fn load() -> Result<Self, CudaError> {
        let mut first = None;
        for path in candidates() {
            match Self::open(&path) {
                Err(error @ CudaError::NoNvrtc { .. }) => first = first.or(Some(error)),
                other => return other,
            }
        }
        Err(first.unwrap_or(CudaError::NoNvrtc {
            tried: "no place to look".to_owned(),
        }))
    }

    /// The library at `path`.
    ///
    /// # Errors
    /// It cannot be loaded, or is no NVRTC.
    pub fn open(path: &Path) -> Result<Self, CudaError> {
        // SAFETY: its initializers are NVIDIA's.
        let library = unsafe { Library::new(path) }.map_err(|error| CudaError::NoNvrtc {
            tried: error.to_string(),
        })?;
        let mut nvrtc = Self {
            library,
            path: path.to_owned(),
            version: String::new(),
        };
        nvrtc.version = nvrtc.read_version()?;
        Ok(nvrtc)
    }

    fn symbol<T: Copy>(&self, symbol: &'static str) -> Result<T, CudaError> {
        // SAFETY: `T` is the symbol's type in nvrtc.h, unchanged since CUDA 11.
        let found = unsafe { self.library.get::<T>(symbol.as_bytes()) };
        found
            .map(|function| *function)
            .map_err(|_| CudaError::NvrtcSymbol {
                path: self.path.clone(),
                symbol,
            })
    }

    fn read_version(&self) -> Result<String, CudaError> {
        type Version = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
        let version: Version = self.symbol("nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: writes two integers.
        unsafe { version(&mut major, &mut minor) };
        Ok(format!("{major}.{minor}"))
    }

    /// Compiles `text` for `arch` (`sm_90a`, …) to a cubin and the compiler's log.
    ///
    /// # Errors
    /// The compiler's log.
    pub fn compile(
        &self,
        name: &str,
        text: &str,
        arch: &str,
        options: &[String],
    ) -> Result<(Vec<u8>, String), CudaError> {
        let create: Create = self.symbol("nvrtcCreateProgram")?;
        let compile: Compile = self.symbol("nvrtcCompileProgram")?;
        let destroy: unsafe extern "C" fn(*mut Program) -> c_int =
            self.symbol("nvrtcDestroyProgram")?;
        let log_size: OfProgram<usize> = self.symbol("nvrtcGetProgramLogSize")?;
        let log: OfProgram<c_char> = self.symbol("nvrtcGetProgramLog")?;
        let cubin_size: OfProgram<usize> = self.symbol("nvrtcGetCUBINSize")?;
        let cubin: OfProgram<c_char> = self.symbol("nvrtcGetCUBIN")?;
        let failed = |log: String| CudaError::Compile {
            kernel: name.to_owned(),
            arch: arch.to_owned(),
            version: self.version.clone(),
            log,
        };
        let c_string = |text: &str| CString::new(text).map_err(|e| failed(e.to_string()));
        let (text, c_name) = (c_string(text)?, c_string(name)?);
        let options = options
            .iter()
            .map(|option| c_string(option))
            .collect::<Result<Vec<_>, _>>()?;
        let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();

        let mut program = ptr::null_mut();
        // SAFETY: strings ended by zero that outlive the call; no headers.
        let created = unsafe {
            create(
                &mut program,
                text.as_ptr(),
                c_name.as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            )
        };
        if created != 0 {
            return Err(failed(format!("nvrtcCreateProgram gives {created}")));
        }
        // SAFETY: a program just made; as many options as are counted.
        let compiled = unsafe { compile(program, pointers.len() as c_int, pointers.as_ptr()) };
        let bytes = |size: OfProgram<usize>, get: OfProgram<c_char>| {
            let mut n = 0;
            // SAFETY: writes one number.
            unsafe { size(program, &mut n) };
            let mut bytes = vec![0u8; n];
            // SAFETY: writes the `n` bytes it told of.
            unsafe { get(program, bytes.as_mut_ptr().cast()) };
            bytes
        };
        let log = String::from_utf8_lossy(&bytes(log_size, log))
            .trim_end_matches('\0')
            .trim()
            .to_owned();
        let result = if compiled == 0 {
            Ok((bytes(cubin_size, cubin), log))
        } else {
            Err(failed(log))
        };
        // SAFETY: made above, last used here.
        unsafe { destroy(&mut program) };
        result
    }
}
