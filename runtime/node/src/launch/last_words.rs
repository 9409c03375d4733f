//! What a node said last, to show with the news of its end.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use super::plan::{NodePlan, Place, Plan};
use super::remote::Site;
use super::ssh::Ssh;

/// Log lines that are shown.
const LINES: usize = 12;
/// How much of a log is read to find them.
const TAIL_BYTES: u64 = 16 << 10;

/// The logs of a node, and how long they are when its run begins: what stands before is of earlier runs.
#[derive(Debug, Clone)]
pub struct LastWords {
    /// Of a node of this machine: its output, then its own log where the configuration names a folder.
    files: Vec<(PathBuf, u64)>,
}

impl LastWords {
    /// From here on.
    pub fn from_now(plan: &Plan, node: &NodePlan) -> Self {
        let files = match node.place {
            Place::Here => vec![plan.output_file(node), plan.log_file(node)],
            Place::There { .. } => Vec::new(),
        };
        Self {
            files: files
                .into_iter()
                .map(|file| {
                    let length = length(&file);
                    (file, length)
                })
                .collect(),
        }
    }

    /// The last lines; none when they cannot be had.
    pub async fn lines(&self, ssh: &Ssh, plan: &Plan, node: &NodePlan) -> Vec<String> {
        match &node.place {
            Place::Here => {
                let mut found = self
                    .files
                    .iter()
                    .map(|(file, from)| tail(file, *from, LINES));
                found.find(|lines| !lines.is_empty()).unwrap_or_default()
            }
            Place::There { destination, dir } => {
                match Site::find(ssh, plan, node, destination, dir).await {
                    Ok(site) => site.tail(LINES).await,
                    Err(_) => Vec::new(),
                }
            }
        }
    }
}

/// Lines to put below a message.
pub fn quoted(lines: &[String]) -> String {
    lines.iter().map(|line| format!("\n  | {line}")).collect()
}

/// Length of a file in bytes; 0 when there is none.
fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// The last lines of a file, at most `count`, of what was written beyond `from` bytes; none when it cannot be read.
fn tail(path: &Path, from: u64, count: usize) -> Vec<String> {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        // A file that is shorter now was put aside meanwhile; all of it is new.
        let from = if from > length { 0 } else { from };
        file.seek(SeekFrom::Start(from.max(length.saturating_sub(TAIL_BYTES))))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..]
        .iter()
        .map(|line| (*line).to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_the_last_lines_of_a_large_file() {
        let path = std::env::temp_dir().join(format!("understudy-tail-{}", std::process::id()));
        let text: String = (0..10_000).map(|n| format!("line {n}\n")).collect();
        fs::write(&path, text).expect("written");
        assert_eq!(tail(&path, 0, 2), ["line 9998", "line 9999"]);
        assert_eq!(tail(&path, length(&path) - 10, 2), ["line 9999"]);
        assert!(tail(&path, length(&path), 2).is_empty());
        fs::write(&path, "only").expect("written");
        assert_eq!(tail(&path, 100, 2), ["only"]);
        fs::remove_file(&path).expect("removed");
        assert!(tail(&path, 0, 2).is_empty());
    }
}
