//! What the engine says when its surroundings do not fit: another LibTorch in its way, less memory than it was told to use.

mod common;

use std::io::Write;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{Scratch, golden};

fn engine() -> Command {
    Command::new(env!("CARGO_BIN_EXE_understudy-engine"))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A LibTorch root with the files of the real one that states another version.
fn stand_in(version: &str) -> (Scratch, PathBuf) {
    let real = Path::new(env!("UNDERSTUDY_BUILD_LIBTORCH"));
    let scratch = Scratch::new("libtorch");
    let root = scratch.path("torch");
    std::fs::create_dir_all(root.join("lib")).unwrap();
    for file in std::fs::read_dir(real.join("lib")).unwrap() {
        let file = file.unwrap();
        symlink(file.path(), root.join("lib").join(file.file_name())).unwrap();
    }
    // Where the libraries look for those of NVIDIA.
    symlink(real.join("../nvidia"), scratch.path("nvidia")).unwrap();
    let text = format!("__version__ = '{version}'\n");
    std::fs::write(root.join("version.py"), text).unwrap();
    (scratch, root)
}

#[test]
fn another_libtorch_in_the_way_is_named() {
    if env!("UNDERSTUDY_BUILD_LIBTORCH").is_empty() {
        // Straight to the descriptor: the test harness would swallow a println.
        let _ = writeln!(
            std::io::stderr(),
            "\nSKIPPED: built with Python's LibTorch, whose place is not known; no other one was put in its way\n"
        );
        return;
    }
    for (version, right) in [("2.10.1+cu130", false), ("2.11.7+cpu", true)] {
        let (_scratch, root) = stand_in(version);
        let output = engine()
            .arg("run")
            .arg(golden("f32_gqa_tied"))
            .args([
                "--token-ids",
                "1,2,3",
                "--max-tokens",
                "2",
                "--device",
                "cpu",
            ])
            .env("LD_LIBRARY_PATH", root.join("lib"))
            .output()
            .unwrap();
        let text = stderr(&output);
        if right {
            assert!(output.status.success(), "{text}");
            continue;
        }
        assert_eq!(output.status.code(), Some(10), "{text}");
        for part in [version, "2.11", root.to_str().unwrap(), "LD_LIBRARY_PATH"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}

/// A cache that the machine could hold, in a process that may not: as on a GPU that others use too.
#[test]
fn a_stock_cache_that_cannot_be_allocated_is_told_in_numbers() {
    // SAFETY: plain queries.
    let memory = unsafe {
        libc::sysconf(libc::_SC_PHYS_PAGES) as u64 * libc::sysconf(libc::_SC_PAGESIZE) as u64
    };
    let limit = libc::rlimit {
        rlim_cur: memory / 2,
        rlim_max: memory / 2,
    };
    let mut command = engine();
    command
        .arg("bench")
        .arg(golden("f32_gqa_tied"))
        .args(["--numerics", "fast", "--device", "cpu"])
        .args(["--sequences", "10000000", "--kv-memory", "0.9"]);
    // SAFETY: setrlimit is async-signal-safe.
    unsafe {
        command.pre_exec(
            move || match libc::setrlimit(libc::RLIMIT_AS, &raw const limit) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            },
        );
    }
    let output = command.output().unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(10), "{text}");
    for part in ["KV cache", " MiB", "lower kv_memory"] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

/// `run` prints what a stream would: all of it, a last broken character included.
#[test]
fn run_prints_every_character() {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../demo");
    let output = engine()
        .arg("run")
        .arg(&demo)
        .args(["--prompt", "Count from 5 to 12:", "--device", "cpu"])
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        " 5 6 7 8 9 10 11 12",
        "{}",
        stderr(&output)
    );
}
