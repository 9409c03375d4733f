//! The shell scripts that run on other machines: POSIX sh and coreutils, nothing of ours.

use std::path::Path;
use std::time::Duration;

/// Exit status of [`watch`] when the process has ended.
pub const GONE: i32 = 44;
/// Answers of [`stop`].
pub const STOPPED: &str = "stopped";
pub const KILLED: &str = "killed";
pub const NOT_RUNNING: &str = "not running";

/// A word for the shell, whatever it holds.
pub fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// A path as a person would write it: quoted only where it must be.
pub fn shown(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_alphanumeric() || "/._-+,:@%".contains(c);
    if text.chars().all(plain) {
        text.into_owned()
    } else {
        quote(&text)
    }
}

fn quote_path(path: &Path) -> String {
    quote(&path.to_string_lossy())
}

/// `alive PID TICKS`: whether that very process runs. `ticks PID` prints when it began. See `ProcessId` for the fields.
const FUNCTIONS: &str = r#"
ticks() {
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    rest=${stat##*) }
    case $rest in Z*|X*) return 1 ;; esac
    set -- $rest
    shift 19
    echo "$1"
}
alive() { [ -n "$1" ] && [ "$(ticks "$1")" = "$2" ]; }
"#;

/// One group, so that a half-received script does nothing.
fn group(body: &str) -> String {
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
    pub cookie: &'a Path,
    pub cookie_text: &'a str,
    pub run_dir: &'a Path,
    pub pid_file: &'a Path,
    pub output: &'a Path,
    pub name: &'a str,
}

impl Start<'_> {
    /// Prints pid and start ticks. Files are private and replaced whole.
    pub fn script(&self) -> String {
        let folder = |path: &Path| quote_path(path.parent().unwrap_or(Path::new("/")));
        group(&format!(
            r#"set -e
pid_file={pid_file}
if {{ read -r pid began < "$pid_file"; }} 2>/dev/null && alive "$pid" "$began"; then
    echo "it runs on $(uname -n) already (pid $pid), from another launch; \`understudy down\` with the same configuration stops it" >&2
    exit 43
fi
mkdir -p {run_dir} {config_folder} {cookie_folder}
put() {{ printf '%s' "$2" > "$1.new.$$"; mv -f "$1.new.$$" "$1"; }}
put {cookie} {cookie_text}
put {config} {config_text}
setsid {binary} node --config {config} --name {name} </dev/null >>{output} 2>&1 &
pid=$!
began=$(ticks "$pid") || began=0
put "$pid_file" "$pid $began
"
echo "$pid $began""#,
            pid_file = quote_path(self.pid_file),
            run_dir = quote_path(self.run_dir),
            config_folder = folder(self.config),
            cookie_folder = folder(self.cookie),
            cookie = quote_path(self.cookie),
            cookie_text = quote(self.cookie_text),
            config = quote_path(self.config),
            config_text = quote(self.config_text),
            binary = quote_path(self.binary),
            name = quote(self.name),
            output = quote_path(self.output),
        ))
    }
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

/// SIGTERM, then SIGKILL to the process group after `grace`. Prints [`STOPPED`], [`KILLED`] or [`NOT_RUNNING`].
pub fn stop(pid_file: &Path, grace: Duration) -> String {
    group(&format!(
        r#"pid_file={pid_file}
{{ read -r pid began < "$pid_file"; }} 2>/dev/null || {{ echo '{NOT_RUNNING}'; exit 0; }}
if ! alive "$pid" "$began"; then rm -f "$pid_file"; echo '{NOT_RUNNING}'; exit 0; fi
answer={STOPPED}
kill -s TERM -- "$pid" 2>/dev/null
left={tenths}
while alive "$pid" "$began" && [ "$left" -gt 0 ]; do sleep 0.1; left=$((left - 1)); done
if alive "$pid" "$began"; then answer={KILLED}; fi
kill -s KILL -- "-$pid" 2>/dev/null
left=50
while alive "$pid" "$began" && [ "$left" -gt 0 ]; do sleep 0.1; left=$((left - 1)); done
rm -f "$pid_file"
echo "$answer""#,
        pid_file = quote_path(pid_file),
        tenths = grace.as_millis() / 100,
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    /// Runs a script as the other side would; exit status, standard output, standard error.
    fn sh(script: &str) -> (i32, String, String) {
        // A script that hangs fails its test with `timeout`'s own status.
        let mut child = Command::new("timeout")
            .args(["20", "sh", "-s"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("sh");
        child
            .stdin
            .take()
            .expect("piped")
            .write_all(script.as_bytes())
            .expect("taken");
        let done = child.wait_with_output().expect("ended");
        let text = |bytes| String::from_utf8(bytes).expect("utf-8");
        (
            done.status.code().unwrap_or(-1),
            text(done.stdout),
            text(done.stderr),
        )
    }

    fn folder(name: &str) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!(
            "understudy-scripts-{}-{name} it's",
            std::process::id()
        ));
        fs::create_dir_all(path.join("bin")).expect("a temporary folder");
        path
    }

    fn program(path: &Path, text: &str) {
        use std::os::unix::fs::PermissionsExt as _;
        fs::write(path, text).expect("written");
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("set");
    }

    #[test]
    fn the_installation_is_found_or_its_lack_is_explained() {
        let root = folder("find");
        let (code, _, error) = sh(&find_installation(&root.to_string_lossy()));
        assert_eq!(code, 42);
        assert!(
            error.contains("no target/release/understudy or bin/understudy"),
            "{error}"
        );
        program(&root.join("bin/understudy"), "#!/bin/sh\n");
        let (code, out, _) = sh(&find_installation(&root.to_string_lossy()));
        assert_eq!(
            (code, out),
            (
                0,
                format!(
                    "{}\nbin/understudy\n",
                    root.canonicalize().expect("there").display()
                )
            )
        );
        let (code, _, error) = sh(&find_installation("/nowhere/it's"));
        assert_eq!(code, 41);
        assert!(
            error.contains("there is no folder /nowhere/it's"),
            "{error}"
        );
        fs::remove_dir_all(&root).expect("removed");
    }

    #[test]
    fn a_node_is_started_seen_and_stopped() {
        let root = folder("start");
        let binary = root.join("bin/understudy");
        // Says what it was called with, and ignores the first signal.
        program(
            &binary,
            "#!/bin/sh\necho \"$@\"\ntrap '' TERM\nwhile :; do sleep 0.05; done\n",
        );
        let start = Start {
            binary: &binary,
            config: &root.join("config/.launched-x.toml"),
            config_text: "# it's\nkey = \"$HOME `x`\"\n",
            cookie: &root.join("run/cookie"),
            cookie_text: "secret\n",
            run_dir: &root.join("run"),
            pid_file: &root.join("run/a.pid"),
            output: &root.join("run/a.log"),
            name: "a",
        };
        let (code, out, error) = sh(&start.script());
        assert_eq!((code, error.as_str()), (0, ""));
        let (pid, ticks) = parse_process(&out).expect("pid and ticks");
        assert_eq!(
            super::super::pidfile::PidFile(start.pid_file.to_owned()).running(),
            Some(super::super::pidfile::ProcessId {
                pid,
                start_ticks: ticks
            }),
            "both sides read the same file"
        );
        assert_eq!(
            fs::read_to_string(start.config).expect("copied"),
            start.config_text
        );
        assert_eq!(
            fs::read_to_string(start.cookie).expect("copied"),
            "secret\n"
        );
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(
            fs::metadata(start.cookie)
                .expect("there")
                .permissions()
                .mode()
                & 0o777,
            0o600
        );

        assert_eq!(sh(&running(start.pid_file)).1, format!("{pid} {ticks}\n"));
        let (code, _, error) = sh(&start.script());
        assert_eq!(code, 43, "a second start is refused");
        assert!(error.contains(&format!("already (pid {pid})")), "{error}");

        let (_, out, _) = sh(&stop(start.pid_file, Duration::from_millis(200)));
        assert_eq!(out.trim(), KILLED);
        assert_eq!(sh(&watch(pid, ticks)).0, GONE);
        assert_eq!(sh(&running(start.pid_file)).1, "");
        assert_eq!(
            sh(&stop(start.pid_file, Duration::ZERO)).1.trim(),
            NOT_RUNNING
        );
        let (_, out, _) = sh(&tail(start.output, 1, false));
        assert_eq!(
            out.trim(),
            format!("node --config {} --name a", start.config.display())
        );
        fs::remove_dir_all(&root).expect("removed");
    }

    #[test]
    fn half_a_script_does_nothing() {
        let root = folder("half");
        let marker = root.join("marker");
        let whole = group(&format!("touch {}\n", quote_path(&marker)));
        sh(&whole[..whole.len() - 3]);
        assert!(!marker.exists());
        sh(&whole);
        assert!(marker.exists());
        fs::remove_dir_all(&root).expect("removed");
    }

    #[test]
    fn paths_are_quoted_where_they_must_be() {
        assert_eq!(shown(Path::new("/opt/a-b_c.toml")), "/opt/a-b_c.toml");
        assert_eq!(shown(Path::new("/opt/it's here")), "'/opt/it'\\''s here'");
    }
}
