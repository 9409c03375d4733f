//! Logs that do not fill the disk: beyond a size, a log becomes `<name>.log.1`, in place of the one before.
//!
//! Nodes write into files that they have opened themselves, and are not told when a log is put aside. So the launcher
//! copies a log that has grown, and cuts the original: writers append (`O_APPEND`), so that their next line stands at the
//! new end. A line that is written between the copy and the cut is lost.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::say;

/// Size beyond which a log is put aside.
pub const MAX_LOG_BYTES: u64 = 64 << 20;
/// Time between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Where an old log goes.
pub fn old_log(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

fn is_overgrown(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|found| found.len() > MAX_LOG_BYTES)
}

/// Puts an overgrown log aside that nobody writes to.
pub fn put_aside(path: &Path) -> io::Result<()> {
    if is_overgrown(path) {
        fs::rename(path, old_log(path))?;
    }
    Ok(())
}

/// Copies an overgrown log aside, and cuts it, while somebody appends to it. Returns whether there was need to.
fn cut(path: &Path) -> io::Result<bool> {
    if !is_overgrown(path) {
        return Ok(false);
    }
    let old = old_log(path);
    // First, so that the room for two is enough.
    let _ = fs::remove_file(&old);
    let mut source = OpenOptions::new().read(true).write(true).open(path)?;
    let mut copy = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&old)?;
    if let Err(error) = io::copy(&mut source, &mut copy) {
        let _ = fs::remove_file(&old);
        return Err(error);
    }
    // A node that was started anew in the meantime has put this file aside itself, and writes to a new one.
    if fs::metadata(path)?.ino() == source.metadata()?.ino() {
        source.set_len(0)?;
    }
    Ok(true)
}

/// Keeps these files small for as long as it is polled.
pub async fn keep_small(files: Vec<PathBuf>) {
    let mut told = false;
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        for file in &files {
            let path = file.clone();
            // A copy takes too long for the thread that watches the nodes.
            let done = tokio::task::spawn_blocking(move || cut(&path)).await;
            if let (Ok(Err(error)), false) = (done, told) {
                told = true;
                say(format!(
                    "the log {} grows, and cannot be put aside: {error}",
                    file.display()
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write as _;

    fn folder(name: &str) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("understudy-rotate-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary folder");
        path
    }

    #[test]
    fn a_log_is_cut_under_its_writer() {
        let folder = folder("cut");
        let path = folder.join("a.log");
        let mut writer = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .expect("opened");
        writeln!(writer, "small").expect("written");
        assert!(!cut(&path).expect("nothing to do"));
        writer.set_len(MAX_LOG_BYTES + 1).expect("a sparse file");
        fs::write(old_log(&path), "of last week").expect("written");
        assert!(cut(&path).expect("cut"));
        writeln!(writer, "next").expect("written");
        assert_eq!(fs::read_to_string(&path).expect("there"), "next\n");
        let old = fs::metadata(old_log(&path)).expect("there");
        assert_eq!(old.len(), MAX_LOG_BYTES + 1);
        fs::remove_dir_all(&folder).expect("removed");
    }

    #[test]
    fn an_overgrown_log_is_put_aside_before_a_start() {
        let folder = folder("aside");
        let path = folder.join("a.log");
        put_aside(&path).expect("there is none");
        File::create(&path)
            .and_then(|file| file.set_len(MAX_LOG_BYTES + 1))
            .expect("a sparse file");
        put_aside(&path).expect("renamed");
        assert!(!path.exists() && old_log(&path).exists());
        fs::remove_dir_all(&folder).expect("removed");
    }
}
