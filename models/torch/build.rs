//! Checks the LibTorch that the build is given, and writes its place into the binaries (rpath), so that they start without
//! `LD_LIBRARY_PATH`.

use std::path::{Path, PathBuf};

#[path = "src/libtorch/version.rs"]
mod version;

use version::WANTED;

fn main() {
    for name in [
        "LIBTORCH",
        "LIBTORCH_LIB",
        "LIBTORCH_USE_PYTORCH",
        "LIBTORCH_BYPASS_VERSION_CHECK",
    ] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    if std::env::var_os("LIBTORCH_USE_PYTORCH").is_some() {
        // torch-sys asks Python for the place and checks the version itself; it tells us nothing, so the rpath is left to the user.
        println!("cargo:rustc-env=UNDERSTUDY_BUILD_LIBTORCH=");
        return;
    }
    let Some(libtorch) = std::env::var_os("LIBTORCH").filter(|value| !value.is_empty()) else {
        fail(
            "the environment variable LIBTORCH is not set, and .cargo/config.toml was not read (build from inside the repository)",
        );
    };
    let libtorch = PathBuf::from(libtorch);
    let lib = std::env::var_os("LIBTORCH_LIB")
        .map_or_else(|| libtorch.clone(), PathBuf::from)
        .join("lib");
    let library = lib.join("libtorch_cpu.so");
    println!("cargo:rerun-if-changed={}", library.display());
    if !library.exists() {
        fail(&format!(
            "LIBTORCH is {}, but there is no {}",
            libtorch.display(),
            library.display()
        ));
    }
    if std::env::var_os("LIBTORCH_BYPASS_VERSION_CHECK").is_none() {
        check_version(&libtorch);
    } else {
        println!("cargo:rustc-env=UNDERSTUDY_ANY_LIBTORCH=1");
    }
    // Canonical, because a relative LIBTORCH means something else in every working directory.
    let lib = lib.canonicalize().unwrap_or(lib);
    let root = libtorch.canonicalize().unwrap_or(libtorch);
    println!(
        "cargo:rustc-env=UNDERSTUDY_BUILD_LIBTORCH={}",
        root.display()
    );
    // First relative to the binary (target/release/ and target/release/deps/), so that a moved checkout still runs.
    for origin in [
        "$ORIGIN/../../.deps/libtorch/torch/lib",
        "$ORIGIN/../../../.deps/libtorch/torch/lib",
    ] {
        if lib.ends_with(".deps/libtorch/torch/lib") {
            println!("cargo:rustc-link-arg=-Wl,-rpath,{origin}");
        }
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}

/// Stops a build against another release.
fn check_version(libtorch: &Path) {
    match version::stated(libtorch) {
        Some(version) if version::fits(&version) => {}
        Some(version) => fail(&format!(
            "{} holds LibTorch {version}, but {WANTED} is needed",
            libtorch.display()
        )),
        None => println!(
            "cargo:warning={} states no version (neither build-version nor version.py); assuming LibTorch {WANTED}",
            libtorch.display()
        ),
    }
}

fn fail(what: &str) -> ! {
    eprintln!("error: {what}");
    eprintln!(
        "  run scripts/setup.sh to fetch LibTorch {WANTED}, or set LIBTORCH to an unpacked LibTorch {WANTED}"
    );
    std::process::exit(1);
}
