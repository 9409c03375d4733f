//! The secret that the nodes of a cluster share.
//!
//! Invariant: the secret is never printed, and never leaves this file but as a key derived for one
//! purpose. A cookie with less than 128 bits is refused, because a handshake can be recorded and
//! guessed at offline.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hmac::{Hmac, Mac};
use sha2::Sha256;

/// Least strength of a cookie, in bits.
pub const MIN_COOKIE_BITS: usize = 128;
/// Largest cookie file that is read, in bytes.
const MAX_COOKIE_BYTES: u64 = 4096;
/// A cookie with fewer different characters than this is not random, whatever its length.
const MIN_DISTINCT: usize = 8;

/// The shared secret of a cluster. `Debug` and `Display` do not show it.
#[derive(Clone, PartialEq, Eq)]
pub struct Cookie(Arc<[u8]>);

/// Why a cookie file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CookieError {
    /// There is no such file.
    #[error("cookie file {} does not exist: create it with `head -c 32 /dev/urandom | base64 | (umask 077; cat > {})` and copy it to every node", .0.display(), .0.display())]
    Missing(PathBuf),
    /// The file cannot be read or written.
    #[error("cookie file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others can read the secret.
    #[error("cookie file {} has mode {mode:04o}, so other users can read the secret: run `chmod 600 {}`", path.display(), path.display())]
    TooOpen {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The secret can be guessed.
    #[error("cookie file {} holds about {bits} bits of secret, at least {MIN_COOKIE_BITS} are needed: write 32 random bytes, for example `head -c 32 /dev/urandom | base64`", path.display())]
    TooShort {
        /// The file.
        path: PathBuf,
        /// Upper estimate of its strength.
        bits: usize,
    },
    /// The file is something else.
    #[error("cookie file {} is larger than {MAX_COOKIE_BYTES} bytes: is this the right file?", .0.display())]
    TooLong(PathBuf),
}

impl Cookie {
    /// Reads a cookie; white space around it does not count.
    ///
    /// The file must be readable by its owner only and hold at least [`MIN_COOKIE_BITS`] bits.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, CookieError> {
        let path = path.as_ref();
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => CookieError::Missing(path.into()),
            _ => CookieError::Io {
                path: path.into(),
                source,
            },
        };
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
        if bytes.len() as u64 > MAX_COOKIE_BYTES {
            return Err(CookieError::TooLong(path.into()));
        }
        let secret = bytes.trim_ascii();
        let bits = strength_bits(secret);
        if bits < MIN_COOKIE_BITS {
            return Err(CookieError::TooShort {
                path: path.into(),
                bits,
            });
        }
        Ok(Self(secret.into()))
    }

    /// A fresh cookie of 256 random bits.
    ///
    /// # Panics
    /// When the system has no random numbers; there is no safe way on.
    pub fn generate() -> Self {
        let mut random = [0u8; 32];
        getrandom::fill(&mut random).expect("the system gives random bytes");
        Self(hex(&random).into_bytes().into())
    }

    /// Writes the cookie to a new file that only its owner can read. An existing file is an error.
    pub fn write_new(&self, path: impl AsRef<Path>) -> Result<(), CookieError> {
        let path = path.as_ref();
        let failed = |source| CookieError::Io {
            path: path.into(),
            source,
        };
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        let mut file = options.open(path).map_err(failed)?;
        file.write_all(&self.0)
            .and_then(|()| file.write_all(b"\n"))
            .map_err(failed)?;
        file.sync_all().map_err(failed)
    }

    /// A key for one purpose; different purposes give unrelated keys.
    pub(crate) fn derive(&self, purpose: &str) -> [u8; 32] {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(purpose.as_bytes());
        mac.finalize().into_bytes().into()
    }
}

impl fmt::Debug for Cookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cookie(redacted)")
    }
}

impl fmt::Display for Cookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("redacted")
    }
}

/// Upper estimate of a secret's strength: four bits for a hexadecimal digit, six for other printable
/// characters, eight for raw bytes, nothing for a few characters repeated.
fn strength_bits(secret: &[u8]) -> usize {
    let mut seen = [false; 256];
    secret
        .iter()
        .for_each(|&byte| seen[usize::from(byte)] = true);
    if seen.iter().filter(|&&seen| seen).count() < MIN_DISTINCT {
        return 0;
    }
    let bits = if secret.iter().all(u8::is_ascii_hexdigit) {
        4
    } else if secret.iter().all(|&byte| (0x20..0x7f).contains(&byte)) {
        6
    } else {
        8
    };
    bits * secret.len()
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, content: &[u8], mode: u32) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("understudy-cookie-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn a_generated_cookie_survives_its_file() {
        let path = file("good", b"", 0o600);
        std::fs::remove_file(&path).unwrap();
        let cookie = Cookie::generate();
        cookie.write_new(&path).unwrap();
        assert_eq!(Cookie::read(&path).unwrap(), cookie);
        assert!(cookie.write_new(&path).is_err(), "must not overwrite");
        assert_ne!(cookie.derive("a"), cookie.derive("b"));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn refusals_say_what_to_do() {
        let missing = Cookie::read("/nonexistent/cookie").unwrap_err().to_string();
        assert!(
            missing.contains("does not exist") && missing.contains("urandom"),
            "{missing}"
        );

        for mode in [0o640, 0o604, 0o660, 0o644, 0o700] {
            let open = file("open", hex(&[0xa5; 32]).as_bytes(), mode);
            let said = Cookie::read(&open).unwrap_err().to_string();
            assert!(said.contains("chmod 600"), "{said}");
            std::fs::remove_file(open).unwrap();
        }

        let weak: [&[u8]; 5] = [
            b"",
            b"0123456789abcdef0123456789abcde",
            b"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            b"correct horse",
            b"\n\n",
        ];
        for content in weak {
            let short = file("short", content, 0o600);
            let said = Cookie::read(&short).unwrap_err();
            assert!(matches!(said, CookieError::TooShort { .. }), "{said}");
            std::fs::remove_file(short).unwrap();
        }

        let long = file("long", &[b'x'; 5000], 0o600);
        assert!(matches!(Cookie::read(&long), Err(CookieError::TooLong(_))));
        std::fs::remove_file(long).unwrap();
    }

    #[test]
    fn white_space_does_not_count_and_nothing_is_printed() {
        let text = "  3f9a0c71d2b84e65f0a1b2c3d4e5f607\n";
        let path = file("space", text.as_bytes(), 0o400);
        let cookie = Cookie::read(&path).unwrap();
        assert_eq!(&cookie.0[..], text.trim().as_bytes());
        let shown = format!("{cookie:?} {cookie}");
        assert!(!shown.contains("3f9a"), "{shown}");
        std::fs::remove_file(path).unwrap();
    }
}
