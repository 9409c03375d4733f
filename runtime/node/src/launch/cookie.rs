//! The secret that the nodes of a cluster show each other.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use super::pidfile::write_private;

/// 256 bits, as 64 hexadecimal digits.
const COOKIE_BYTES: usize = 32;

/// Makes the file with a fresh secret, readable by its owner only, unless it is there. Returns whether it was made.
///
/// Two launches at once agree on one secret: the file is written in full under another name and linked into place, and
/// the link of the second one fails.
pub fn ensure(path: &Path) -> io::Result<bool> {
    if path.exists() {
        return Ok(false);
    }
    if let Some(folder) = path.parent() {
        private_folder(folder)?;
    }
    let secret = format!("{}\n", fresh()?);
    static DRAFTS: AtomicU32 = AtomicU32::new(0);
    let number = DRAFTS.fetch_add(1, Ordering::Relaxed);
    let draft = path.with_extension(format!("draft-{}-{number}", std::process::id()));
    write_private(&draft, &secret)?;
    let made = match fs::hard_link(&draft, path) {
        Err(error) if knows_no_links(&error) => write_new(path, &secret),
        linked => linked,
    };
    let _ = fs::remove_file(&draft);
    match made {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// What file systems without hard links answer (FAT: `EPERM`).
fn knows_no_links(error: &io::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, Unsupported};
    matches!(error.kind(), PermissionDenied | Unsupported)
}

/// Only one of two at once makes the file; the other may read it half-written, which its check of the configuration
/// finds.
fn write_new(path: &Path, secret: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    let written = file
        .write_all(secret.as_bytes())
        .and_then(|()| file.sync_all());
    if written.is_err() {
        let _ = fs::remove_file(path);
    }
    written
}

/// Makes a folder, and those above it, that only its owner may enter. One that is there keeps its mode.
pub fn private_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

fn fresh() -> io::Result<String> {
    let mut bytes = [0_u8; COOKIE_BYTES];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn it_is_made_once_secret_and_private() {
        let folder = std::env::temp_dir().join(format!("understudy-cookie-{}", std::process::id()));
        let path = folder.join("deep/er/cookie");
        assert!(ensure(&path).expect("made"));
        let first = fs::read_to_string(&path).expect("readable");
        assert_eq!(first.trim_end().len(), 64);
        assert!(
            first
                .trim_end()
                .bytes()
                .all(|byte| byte.is_ascii_hexdigit())
        );
        assert_eq!(
            fs::metadata(&path).expect("there").permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            fs::metadata(path.parent().expect("has one"))
                .expect("there")
                .permissions()
                .mode()
                & 0o077,
            0
        );

        assert!(!ensure(&path).expect("kept"));
        assert_eq!(fs::read_to_string(&path).expect("readable"), first);
        assert_eq!(
            fs::read_dir(path.parent().expect("has one"))
                .expect("listed")
                .count(),
            1,
            "no draft is left"
        );
        fs::remove_dir_all(&folder).expect("removed");
    }

    #[test]
    fn without_hard_links_it_is_made_once_too() {
        let folder =
            std::env::temp_dir().join(format!("understudy-linkless-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a temporary folder");
        let path = folder.join("cookie");
        write_new(&path, "secret").expect("made");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let second = write_new(&path, "another").expect_err("it is there");
        assert_eq!(second.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&path).expect("there"), "secret");
        assert!(knows_no_links(&io::Error::from_raw_os_error(1)), "EPERM");
        assert!(!knows_no_links(&second));
        fs::remove_dir_all(&folder).expect("removed");
    }

    #[test]
    fn launches_at_once_agree() {
        let folder =
            std::env::temp_dir().join(format!("understudy-cookies-{}", std::process::id()));
        let path = folder.join("cookie");
        let made = (0..8).map(|_| {
            let path = path.clone();
            std::thread::spawn(move || ensure(&path).is_ok_and(|made| made))
        });
        let made: Vec<bool> = made
            .collect::<Vec<_>>()
            .into_iter()
            .map(|thread| thread.join().expect("joined"))
            .collect();
        assert_eq!(made.iter().filter(|made| **made).count(), 1);
        assert!(path.exists());
        fs::remove_dir_all(&folder).expect("removed");
        let several: HashSet<String> = (0..64).map(|_| fresh().expect("random")).collect();
        assert_eq!(several.len(), 64);
    }
}
