//! The file with the secret that the nodes of a cluster share: one rule, for whoever checks it and whoever uses it.
//!
//! Invariant: nothing of the secret enters an error. A cookie with less than 128 bits is refused, because a handshake can
//! be recorded and guessed at offline.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Least strength of a cookie, in bits.
pub const MIN_COOKIE_BITS: usize = 128;
/// Largest cookie file that is read, in bytes.
const MAX_COOKIE_BYTES: u64 = 4096;
/// A cookie with fewer different characters than this is not random, whatever its length.
const MIN_DISTINCT: usize = 8;
/// Makes a cookie.
const RECIPE: &str = "head -c 32 /dev/urandom | base64";

/// Why a cookie file cannot be used.
#[derive(Debug)]
pub enum CookieError {
    /// There is no such file.
    Missing(PathBuf),
    /// The file cannot be read or written.
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A directory, a device, a pipe.
    NotAFile(PathBuf),
    /// Others can read the secret.
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is something else.
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its size, as far as it was read.
        size_bytes: u64,
    },
    /// White space or bytes that are no text within the secret.
    NotOneWord(PathBuf),
    /// The secret can be guessed.
    TooWeak {
        /// The file.
        path: PathBuf,
        /// Upper estimate of its strength.
        bits: usize,
    },
}

impl CookieError {
    /// What is wrong.
    pub fn what(&self) -> String {
        match self {
            Self::Missing(path) => format!("there is no cookie at {}", path.display()),
            Self::Io { path, source } => format!("cannot use {}: {source}", path.display()),
            Self::NotAFile(path) => format!("{} is not a file", path.display()),
            Self::TooOpen { path, mode } => {
                format!("{} can be used by others (mode {mode:03o})", path.display())
            }
            Self::TooLong { path, size_bytes } => format!(
                "{} has {size_bytes} bytes or more; a secret is one line",
                path.display()
            ),
            Self::NotOneWord(path) => format!("{} holds more than one word", path.display()),
            Self::TooWeak { path, bits } => format!(
                "{} holds about {bits} bits of secret, at least {MIN_COOKIE_BITS} are needed",
                path.display()
            ),
        }
    }

    /// What to do about it.
    pub fn help(&self) -> String {
        match self {
            Self::Missing(path) => format!(
                "scripts/launch.sh creates it, as does `{RECIPE} | (umask 077; cat > {})`; on further machines, copy the same file there",
                path.display()
            ),
            Self::Io { .. } => "make it readable for this user".into(),
            Self::NotAFile(_) => "name a file that holds the secret on one line".into(),
            Self::TooOpen { path, .. } => format!(
                "run `chmod 600 {}`, and replace the secret if others may have seen it",
                path.display()
            ),
            Self::TooLong { .. } => "is this the right file? Write the secret alone into it".into(),
            Self::NotOneWord(_) => "write the secret alone into it, as text without spaces".into(),
            Self::TooWeak { .. } => format!("make one with `{RECIPE}`"),
        }
    }
}

impl fmt::Display for CookieError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cookie file: {}: {}", self.what(), self.help())
    }
}

impl std::error::Error for CookieError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// Reads a cookie; white space around it does not count.
///
/// # Errors
/// The file must be readable by its owner only, and hold one word of at least [`MIN_COOKIE_BITS`] bits.
pub fn read_cookie(path: &Path) -> Result<Vec<u8>, CookieError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => CookieError::Missing(path.into()),
        _ => CookieError::Io {
            path: path.into(),
            source,
        },
    };
    // Looked at before it is opened: opening a pipe would wait for its writer.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(CookieError::NotAFile(path.into()));
    }
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o7777;
    if mode & 0o177 != 0 {
        return Err(CookieError::TooOpen {
            path: path.into(),
            mode,
        });
    }
    let mut bytes = Vec::new();
    file.take(MAX_COOKIE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    judge(path, &bytes).map(<[u8]>::to_vec)
}

fn judge<'b>(path: &Path, bytes: &'b [u8]) -> Result<&'b [u8], CookieError> {
    let size_bytes = bytes.len() as u64;
    if size_bytes > MAX_COOKIE_BYTES {
        return Err(CookieError::TooLong {
            path: path.into(),
            size_bytes,
        });
    }
    let secret = bytes.trim_ascii();
    let is_text = std::str::from_utf8(secret)
        .is_ok_and(|text| !text.contains(|c: char| c.is_whitespace() || c.is_control()));
    if !is_text {
        return Err(CookieError::NotOneWord(path.into()));
    }
    let bits = strength_bits(secret);
    if bits < MIN_COOKIE_BITS {
        return Err(CookieError::TooWeak {
            path: path.into(),
            bits,
        });
    }
    Ok(secret)
}

/// Upper estimate of a secret's strength: four bits for a hexadecimal digit, six for other characters, nothing for a few
/// characters repeated.
fn strength_bits(secret: &[u8]) -> usize {
    let mut seen = [false; 256];
    secret
        .iter()
        .for_each(|&byte| seen[usize::from(byte)] = true);
    if seen.iter().filter(|&&seen| seen).count() < MIN_DISTINCT {
        return 0;
    }
    let bits = match secret.iter().all(u8::is_ascii_hexdigit) {
        true => 4,
        false => 6,
    };
    bits * secret.len()
}
