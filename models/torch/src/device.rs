//! Which device computes: the CPU, or a GPU whose LibTorch library is loaded at run time.
//!
//! The engine links LibTorch's CPU part only. `libtorch_cuda.so` registers its kernels when it is loaded, so one binary serves both; it is
//! loaded with `dlopen(RTLD_GLOBAL)` before LibTorch is asked for the first time whether there is CUDA (it remembers the answer).

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use tch::Device;

use crate::libtorch::{self, WrongLibTorch};

/// Names the file `libtorch_cuda.so`, or the directory that holds it, where it is not beside the LibTorch of the build.
pub const ENV_LIBTORCH_CUDA: &str = "UNDERSTUDY_LIBTORCH_CUDA";
/// The root of the LibTorch that is used at run time.
const ENV_LIBTORCH: &str = "LIBTORCH";
/// The root of the LibTorch that this binary was built with.
const BUILD_LIBTORCH: &str = env!("UNDERSTUDY_BUILD_LIBTORCH");
const LIBRARY: &str = "libtorch_cuda.so";

/// What the configuration asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU if CUDA can be had, else the CPU.
    Auto,
    Cpu,
    Cuda(usize),
}

/// A device that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("device {0:?} is not known; allowed: auto, cpu, cuda, cuda:0, cuda:1, ...")]
    Unknown(String),
    #[error(
        "CUDA was asked for, but {LIBRARY} was not found in {searched}; run scripts/setup.sh --cuda, or set {ENV_LIBTORCH_CUDA} to it"
    )]
    NoLibrary { searched: String },
    #[error("CUDA was asked for, but {path} cannot be loaded: {reason}")]
    LoadFailed { path: PathBuf, reason: String },
    #[error("CUDA was asked for, but {0}")]
    OtherRelease(#[from] WrongLibTorch),
    #[error(
        "CUDA was asked for, but LibTorch finds no usable GPU; check the driver with nvidia-smi"
    )]
    NoGpu,
    #[error("cuda:{index} was asked for, but there are {count} GPUs (cuda:0 to cuda:{})", count - 1)]
    NoSuchGpu { index: usize, count: usize },
}

impl FromStr for DeviceChoice {
    type Err = DeviceError;

    fn from_str(text: &str) -> Result<Self, DeviceError> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let index = text
                    .strip_prefix("cuda:")
                    .and_then(|index| index.parse().ok());
                index
                    .map(Self::Cuda)
                    .ok_or_else(|| DeviceError::Unknown(text.to_owned()))
            }
        }
    }
}

impl DeviceChoice {
    /// The device to use; loads CUDA's library if it comes to that.
    ///
    /// # Errors
    /// [`DeviceError`] if a GPU was asked for by name and cannot be had.
    pub fn resolve(self) -> Result<Device, DeviceError> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(index) => cuda(index),
            Self::Auto if driver_present() => Ok(cuda(0).unwrap_or_else(|error| {
                // Nobody asked for the GPU, so this is no error; but whoever wonders why it idles should find a word.
                eprintln!("understudy-engine: computing on the CPU; device auto found a GPU driver, but: {error}");
                Device::Cpu
            })),
            Self::Auto => Ok(Device::Cpu),
        }
    }
}

/// `cpu`, `cuda:0`, ...
#[must_use]
pub fn device_name(device: Device) -> String {
    match device {
        Device::Cuda(index) => format!("cuda:{index}"),
        _ => "cpu".to_owned(),
    }
}

/// Loading CUDA's libraries takes a second and hundreds of megabytes: `auto` does it only where a driver is.
fn driver_present() -> bool {
    Path::new("/dev/nvidiactl").exists() || Path::new("/dev/dxg").exists()
}

fn cuda(index: usize) -> Result<Device, DeviceError> {
    load_library()?;
    if !tch::Cuda::is_available() {
        return Err(DeviceError::NoGpu);
    }
    let count = tch::Cuda::device_count() as usize;
    if index >= count {
        return Err(DeviceError::NoSuchGpu { index, count });
    }
    Ok(Device::Cuda(index))
}

/// Where the library may lie, the most explicit place first.
fn candidates() -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Some(place) = std::env::var_os(ENV_LIBTORCH_CUDA).map(PathBuf::from) {
        // Explicit: nothing else is tried.
        return vec![if place.is_dir() {
            place.join(LIBRARY)
        } else {
            place
        }];
    }
    if let Some(root) = std::env::var_os(ENV_LIBTORCH).map(PathBuf::from) {
        places.push(root.join("lib").join(LIBRARY));
    }
    if !BUILD_LIBTORCH.is_empty() {
        places.push(Path::new(BUILD_LIBTORCH).join("lib").join(LIBRARY));
    }
    places.dedup();
    places
}

fn load_library() -> Result<(), DeviceError> {
    let candidates = candidates();
    let Some(path) = candidates.iter().find(|path| path.exists()) else {
        let searched: Vec<String> = candidates
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        return Err(DeviceError::NoLibrary {
            searched: searched.join(", "),
        });
    };
    let failed = |reason: String| DeviceError::LoadFailed {
        path: path.clone(),
        reason,
    };
    // A library of another release would be mixed with the CPU part that this binary is linked with, and crash in some later call.
    libtorch::check(path)?;
    let name =
        CString::new(path.as_os_str().as_bytes()).map_err(|error| failed(error.to_string()))?;
    // SAFETY: a library's initialisers run here; this one is made for it. The handle is kept for the life of the process.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if handle.is_null() {
        // SAFETY: after a failed dlopen, dlerror gives a text that is valid until the next call on this thread.
        let reason = unsafe {
            let text = libc::dlerror();
            if text.is_null() {
                "no reason given".to_owned()
            } else {
                CStr::from_ptr(text).to_string_lossy().into_owned()
            }
        };
        return Err(failed(reason));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_parsed_and_unknown_ones_are_told_what_is_allowed() {
        assert_eq!("auto".parse::<DeviceChoice>().unwrap(), DeviceChoice::Auto);
        assert_eq!(
            "cuda".parse::<DeviceChoice>().unwrap(),
            DeviceChoice::Cuda(0)
        );
        assert_eq!(
            "cuda:3".parse::<DeviceChoice>().unwrap(),
            DeviceChoice::Cuda(3)
        );
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            let error = wrong.parse::<DeviceChoice>().unwrap_err().to_string();
            assert!(error.contains("allowed: auto, cpu"), "{error}");
        }
    }
}
