//! The shell scripts that run on other machines: POSIX sh and coreutils, nothing of ours. A script is one `{ … }` group,
//! so that a connection that breaks in the middle runs none of it.

use std::path::Path;
use std::time::Duration;

use super::rotate::MAX_LOG_BYTES;
use super::shell::{quote, quote_path};

/// Exit status of [`watch`] when the process has ended.
pub const GONE: i32 = 44;
/// Exit status of [`Start`] when a file cannot be written. Then nothing runs.
pub const WRITE_FAILED: i32 = 45;
/// Answers of [`stop`].
pub const STOPPED: &str = "stopped";
pub const KILLED: &str = "killed";
pub const NOT_RUNNING: &str = "not running";

/// - `ticks PID` prints when that process began; `alive PID TICKS`: whether that very process runs. See `ProcessId` for
///   the fields.
/// - `end PID TICKS TENTHS`: SIGTERM, and after so many tenths of a second SIGKILL to the process group. Sets `answer` to
///   [`STOPPED`] or [`KILLED`]; fails when the process runs all the same.
/// - `put FILE TEXT`: a private file, replaced whole; what stands in the way is on standard error.
const FUNCTIONS: &str = r#"
ticks() {
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    rest=${stat##*) }
    case $rest in Z*|X*) return 1 ;; esac
    set -- $rest
    shift 19
    echo "$1"
}
alive() { [ -n "$1" ] && [ -n "$2" ] && [ "$(ticks "$1")" = "$2" ]; }
end() {
    answer=stopped
    kill -s TERM -- "$1" 2>/dev/null || :
    left=$3
    while alive "$1" "$2" && [ "$left" -gt 0 ]; do sleep 0.1; left=$((left - 1)); done
    if alive "$1" "$2"; then answer=killed; fi
    kill -s KILL -- "-$1" 2>/dev/null || :
    left=50
    while alive "$1" "$2" && [ "$left" -gt 0 ]; do sleep 0.1; left=$((left - 1)); done
    ! alive "$1" "$2"
}
put() {
    if printf '%s' "$2" > "$1.new.$$" && mv -f "$1.new.$$" "$1"; then return 0; fi
    rm -f "$1.new.$$"
    echo "cannot write $1 on $(uname -n): is its disk full?" >&2
    return 1
}
"#;

/// One group, so that a half-received script does nothing.
pub fn group(body: &str) -> String {
    format!("{{\nset -u\numask 077\n{FUNCTIONS}\n{body}\nexit 0\n}}\n")
}

/// Prints the absolute folder of the installation, then the program's path in it.
pub fn find_installation(dir: &str) -> String {
    group(&format!(
        r#"dir={dir}
case $dir in "~") dir=$HOME ;; "~/"*) dir=$HOME/${{dir#"~/"}} ;; /*) ;; *) dir=$HOME/$dir ;; esac
cd "$dir" 2>/dev/null || {{ echo "there is no folder $dir on $(uname -n); set the dir of the node to the installation there" >&2; exit 41; }}
for program in target/release/understudy bin/understudy; do
    if [ -x "$program" ]; then pwd -P; echo "$program"; exit 0; fi
done
echo "no target/release/understudy or bin/understudy in $dir on $(uname -n); build it there (scripts/setup.sh, then cargo build --release) or copy it" >&2
exit 42"#,
        dir = quote(dir),
    ))
}

/// The start of a node.
pub struct Start<'a> {
    pub binary: &'a Path,
    pub config: &'a Path,
    pub config_text: &'a str,
    /// Files that only the node's user may read, with their texts.
    pub secrets: &'a [(&'a Path, &'a str)],
    pub run_dir: &'a Path,
    pub pid_file: &'a Path,
    /// Stands beside the pid file, as `<node>.owner`. A node that runs with another owner is left alone, one with the same is replaced.
    pub owner: &'a str,
    pub output: &'a Path,
    pub name: &'a str,
    /// For the node that is replaced.
    pub grace: Duration,
}

impl Start<'_> {
    /// Prints pid and start ticks. Files are private and replaced whole.
    pub fn script(&self) -> String {
        let folder = |path: &Path| quote_path(path.parent().unwrap_or(Path::new("/")));
        let secrets: String = self
            .secrets
            .iter()
            .map(|(path, text)| {
                let (folder, path) = (folder(path), quote_path(path));
                format!(
                    "mkdir -p {folder}\nput {path} {} || exit {WRITE_FAILED}\n",
                    quote(text)
                )
            })
            .collect();
        group(&format!(
            r#"set -e
pid_file={pid_file}
owner_file=${{pid_file%.pid}}.owner
owner={owner}
output={output}
if {{ read -r pid began < "$pid_file"; }} 2>/dev/null && alive "$pid" "$began"; then
    if [ "$(cat "$owner_file" 2>/dev/null)" != "$owner" ]; then
        echo "it runs on $(uname -n) already (pid $pid), from another launch; \`understudy down\` with the same configuration stops it" >&2
        exit 43
    fi
    end "$pid" "$began" {tenths} || {{ echo "it runs on $(uname -n) already, and cannot be stopped (pid $pid)" >&2; exit 46; }}
    rm -f "$pid_file"
fi
mkdir -p {run_dir} {config_folder}
if [ -f "$output" ] && [ "$(wc -c < "$output")" -gt {MAX_LOG_BYTES} ]; then mv -f "$output" "$output.1"; fi
put "$owner_file" "$owner" || exit {WRITE_FAILED}
{secrets}put {config} {config_text} || exit {WRITE_FAILED}
setsid {binary} node --config {config} --name {name} </dev/null >>"$output" 2>&1 &
pid=$!
began=$(ticks "$pid") || began=0
put "$pid_file" "$pid $began
" || {{ kill -s KILL -- "-$pid" "$pid" 2>/dev/null || :; exit {WRITE_FAILED}; }}
echo "$pid $began""#,
            pid_file = quote_path(self.pid_file),
            owner = quote(self.owner),
            tenths = tenths(self.grace),
            run_dir = quote_path(self.run_dir),
            config_folder = folder(self.config),
            config = quote_path(self.config),
            config_text = quote(self.config_text),
            binary = quote_path(self.binary),
            name = quote(self.name),
            output = quote_path(self.output),
        ))
    }
}

fn tenths(grace: Duration) -> u128 {
    grace.as_millis() / 100
}

/// Prints an empty line a second while the process runs (which also ends the script when the connection is gone), then
/// exits with [`GONE`].
pub fn watch(pid: u32, start_ticks: u64) -> String {
    group(&format!(
        "while alive {pid} {start_ticks}; do echo || exit 1; sleep 1; done\nexit {GONE}"
    ))
}

/// Prints pid and start ticks of what the pid file names, if it runs.
pub fn running(pid_file: &Path) -> String {
    let pid_file = quote_path(pid_file);
    group(&format!(
        r#"if read -r pid began < {pid_file} && alive "$pid" "$began"; then echo "$pid $began"; fi 2>/dev/null"#
    ))
}

/// SIGTERM, then SIGKILL to the process group after `grace`, for what the pid file names; with an `owner`, only if it is
/// that one's. Prints [`STOPPED`], [`KILLED`] or [`NOT_RUNNING`].
pub fn stop(pid_file: &Path, grace: Duration, owner: Option<&str>) -> String {
    let others = owner.map_or_else(String::new, |owner| {
        format!(
            r#"[ "$(cat "$owner_file" 2>/dev/null)" = {} ] || {{ echo '{NOT_RUNNING}'; exit 0; }}
"#,
            quote(owner)
        )
    });
    group(&format!(
        r#"pid_file={pid_file}
owner_file=${{pid_file%.pid}}.owner
{others}{{ read -r pid began < "$pid_file"; }} 2>/dev/null || {{ echo '{NOT_RUNNING}'; exit 0; }}
if ! alive "$pid" "$began"; then rm -f "$pid_file" "$owner_file"; echo '{NOT_RUNNING}'; exit 0; fi
end "$pid" "$began" {tenths} || {{ echo "it cannot be killed on $(uname -n) (pid $pid)" >&2; exit 46; }}
rm -f "$pid_file" "$owner_file"
echo "$answer""#,
        pid_file = quote_path(pid_file),
        tenths = tenths(grace),
    ))
}

/// Prints the last `count` lines of a file, and, with `follow`, what is added to it.
pub fn tail(file: &Path, count: usize, follow: bool) -> String {
    let follow = if follow { "-F " } else { "" };
    group(&format!(
        "exec tail -n {count} {follow}{} </dev/null",
        quote_path(file)
    ))
}

/// Reads `<pid> <start ticks>`.
pub fn parse_process(line: &str) -> Option<(u32, u64)> {
    let (pid, ticks) = line.trim().split_once(' ')?;
    Some((pid.parse().ok()?, ticks.parse().ok()?))
}
