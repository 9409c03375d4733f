//! The secret that the nodes of a cluster share.
//!
//! Invariant: the secret is never printed, and never leaves this file but as a key derived for one
//! purpose. What a file must be like to hold one is said in the configuration's crate, which checks it before a node starts.

use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use hmac::{Hmac, Mac};
use sha2::Sha256;
use understudy_config::{CookieError, read_cookie};

/// The shared secret of a cluster. `Debug` and `Display` do not show it. It cannot be compared: only proofs made with it
/// are, in constant time.
#[derive(Clone)]
pub struct Cookie(Arc<[u8]>);

impl Cookie {
    /// Reads a cookie, by the rules of [`understudy_config::read_cookie`].
    pub fn read(path: impl AsRef<Path>) -> Result<Self, CookieError> {
        Ok(Self(read_cookie(path.as_ref())?.into()))
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

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    use understudy_config::{ClusterConfig, LoadOptions, PathCheck};

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
        assert_eq!(Cookie::read(&path).unwrap().derive("a"), cookie.derive("a"));
        assert!(cookie.write_new(&path).is_err(), "must not overwrite");
        assert_ne!(cookie.derive("a"), cookie.derive("b"));
        std::fs::remove_file(&path).unwrap();
    }

    /// What the check of a configuration says about a cookie file.
    fn checked(path: &Path) -> Result<(), String> {
        let text = format!(
            "[cluster]\ncookie_file = {path:?}\n[[node]]\nname = \"a\"\nroles = [\"gateway\"]\n\
             cluster_port = 1\nclient_port = 2\n[[node]]\nname = \"b\"\nroles = [\"host\"]\n\
             cluster_port = 3\n[[model]]\nname = \"m\"\npath = \"/nowhere\"\n"
        );
        let options = LoadOptions {
            paths: PathCheck::Node("a".into()),
        };
        let checked = ClusterConfig::parse("/c.toml", &text, &options);
        checked.map(drop).map_err(|report| report.to_string())
    }

    #[test]
    fn the_check_and_the_node_judge_by_one_rule() {
        const GOOD: &[u8] = b"3f9a0c71d2b84e65f0a1b2c3d4e5f607";
        let table: [(&str, &[u8], u32, &str); 15] = [
            ("hex", GOOD, 0o600, ""),
            (
                "hex, read-only, with spaces",
                b"  3f9a0c71d2b84e65f0a1b2c3d4e5f607 \n",
                0o400,
                "",
            ),
            (
                "22 characters of base64",
                b"abcdefghijklmnopqrstuv",
                0o600,
                "",
            ),
            (
                "21 characters of base64",
                b"abcdefghijklmnopqrstu",
                0o600,
                "about 126 bits",
            ),
            (
                "31 hexadecimal digits",
                b"0123456789abcdef0123456789abcde",
                0o600,
                "about 124 bits",
            ),
            ("one character", &[b'a'; 40], 0o600, "about 0 bits"),
            ("nothing", b"\n\n", 0o600, "about 0 bits"),
            (
                "two words",
                b"correct-horse-battery staple-and-more",
                0o600,
                "more than one word",
            ),
            (
                "two lines",
                b"3f9a0c71d2b84e65f0a1b2c3d4e5f607\n0",
                0o600,
                "more than one word",
            ),
            (
                "no text",
                &[0xf0, 0x9f, 1, 2, 3, 4, 5, 6, 7, 8, 0x99, 0xff],
                0o600,
                "more than one word",
            ),
            ("a novel", &[b'x'; 5000], 0o600, "a secret is one line"),
            ("for the group", GOOD, 0o640, "mode 640"),
            ("for all", GOOD, 0o604, "mode 604"),
            ("writable for the group", GOOD, 0o620, "mode 620"),
            ("a program", GOOD, 0o700, "mode 700"),
        ];
        for (name, content, mode, expected) in table {
            let path = file("table", content, mode);
            let read = Cookie::read(&path)
                .map(drop)
                .map_err(|error| error.to_string());
            for said in [read, checked(&path)] {
                match said {
                    Ok(()) => assert_eq!(expected, "", "{name}"),
                    Err(said) => {
                        assert!(
                            !expected.is_empty() && said.contains(expected),
                            "{name}: {said}"
                        );
                        assert!(!said.contains("3f9a"), "{name}: {said}");
                    }
                }
            }
            std::fs::remove_file(path).unwrap();
        }
        for (path, expected) in [
            ("/nonexistent/cookie", "there is no cookie"),
            ("/", "is not a file"),
        ] {
            let said = Cookie::read(path).unwrap_err().to_string();
            assert!(said.contains(expected), "{said}");
            assert!(checked(Path::new(path)).unwrap_err().contains(expected));
        }
    }

    #[test]
    fn nothing_is_printed() {
        let path = file("hidden", b"3f9a0c71d2b84e65f0a1b2c3d4e5f607", 0o600);
        let cookie = Cookie::read(&path).unwrap();
        let shown = format!("{cookie:?} {cookie}");
        assert!(!shown.contains("3f9a"), "{shown}");
        std::fs::remove_file(path).unwrap();
    }
}
