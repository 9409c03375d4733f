//! The LibTorch that this process has loaded: where it lies, and whether it is the one that the engine was built for.
//!
//! The build checks what it links against, but the dynamic loader decides at run time, and `LD_LIBRARY_PATH` has precedence over the
//! path in the binary. Another release would load well and crash in some later call, or compute something else.

pub mod version;

use std::ffi::{CStr, OsStr, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const LIBRARY: &str = "libtorch_cpu.so";
/// Set by the build script when the build was told to take any version.
const ANY_VERSION: bool = option_env!("UNDERSTUDY_ANY_LIBTORCH").is_some();

/// The loaded LibTorch is of another release.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{path} is of LibTorch {found}, but this engine was built for {}; take it out of LD_LIBRARY_PATH, or run scripts/setup.sh to fetch the right one",
    version::WANTED
)]
pub struct WrongLibTorch {
    pub path: PathBuf,
    pub found: String,
}

/// Checks the library that the dynamic loader has found. One whose place states no version is taken at its word.
///
/// # Errors
/// [`WrongLibTorch`].
pub fn check_loaded() -> Result<(), WrongLibTorch> {
    match loaded() {
        Some(path) if !ANY_VERSION => check(&path),
        _ => Ok(()),
    }
}

/// Checks one library by what the root above its directory states.
///
/// # Errors
/// [`WrongLibTorch`].
pub fn check(library: &Path) -> Result<(), WrongLibTorch> {
    match root_of(library).and_then(version::stated) {
        Some(found) if !version::fits(&found) => Err(WrongLibTorch {
            path: library.to_owned(),
            found,
        }),
        _ => Ok(()),
    }
}

/// The release that computes, such as `2.11.0`; without what it was packaged for (`+cpu`, `+cu130`), which does not change the
/// operators.
#[must_use]
pub fn loaded_version() -> String {
    let stated = loaded().and_then(|library| version::stated(root_of(&library)?));
    let version = stated.unwrap_or_else(|| version::WANTED.to_owned());
    version.split('+').next().unwrap_or_default().to_owned()
}

/// `root/lib/library`, not resolved: a link to a file elsewhere belongs to where it stands.
fn root_of(library: &Path) -> Option<&Path> {
    library.parent()?.parent()
}

/// The file of the loaded library; `None` where it is linked statically or has another name.
fn loaded() -> Option<PathBuf> {
    let mut found: Option<PathBuf> = None;
    // SAFETY: the callback gets back the pointer to `found`, which outlives the call, and nobody else has it meanwhile.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut found).cast()) };
    found
}

unsafe extern "C" fn look(
    object: *mut libc::dl_phdr_info,
    _size: usize,
    found: *mut c_void,
) -> c_int {
    // SAFETY: the loader gives a valid record; its name is a C string or null.
    let name = unsafe { (*object).dlpi_name };
    if name.is_null() {
        return 0;
    }
    // SAFETY: see above.
    let path = Path::new(OsStr::from_bytes(
        unsafe { CStr::from_ptr(name) }.to_bytes(),
    ));
    if path.file_name() != Some(OsStr::new(LIBRARY)) {
        return 0;
    }
    // SAFETY: `loaded` passes a pointer to this type.
    unsafe { *found.cast::<Option<PathBuf>>() = Some(path.to_owned()) };
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loaded_library_is_found_and_is_the_right_one() {
        let path = loaded().expect("this test links LibTorch");
        assert!(path.ends_with(LIBRARY) && path.exists(), "{path:?}");
        assert_eq!(check_loaded(), Ok(()));
        assert!(version::fits(&loaded_version()));
    }

    #[test]
    fn versions_are_compared_by_release() {
        for right in ["2.11", "2.11.0", "2.11.3+cu130", "2.11+cpu"] {
            assert!(version::fits(right), "{right}");
        }
        for wrong in ["2.1", "2.110.0", "2.10.1", "2.12.0", "3.11", ""] {
            assert!(!version::fits(wrong), "{wrong}");
        }
    }

    #[test]
    fn a_library_of_another_release_is_refused() {
        let root = std::env::temp_dir().join(format!("understudy-libtorch-{}", std::process::id()));
        std::fs::create_dir_all(root.join("lib")).unwrap();
        let library = root.join("lib").join(LIBRARY);
        assert_eq!(check(&library), Ok(()), "it states nothing");
        std::fs::write(root.join("version.py"), "__version__ = '2.10.1+cu130'\n").unwrap();
        let error = check(&library).unwrap_err().to_string();
        for part in ["2.10.1+cu130", version::WANTED, library.to_str().unwrap()] {
            assert!(error.contains(part), "{error}");
        }
        std::fs::write(root.join("build-version"), "2.11.0+cpu\n").unwrap();
        assert_eq!(check(&library), Ok(()));
        std::fs::remove_dir_all(&root).unwrap();
    }
}
