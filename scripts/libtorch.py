"""Fetches and unpacks LibTorch; called by scripts/setup.sh, which says what for.

Order of work, and why an interruption at any point does no harm:
  1. each wheel of the lock file is downloaded by pip into CACHE/partial, held to its SHA-256, then renamed into CACHE:
     a file under CACHE is whole, and is checked again before it is used;
  2. the wheels are unpacked into DEPS/libtorch.new, whose stamp is written last;
  3. DEPS/libtorch.new is renamed to DEPS/libtorch (an older tree is moved aside first, and removed afterwards).
A run that finds a stamped libtorch.new goes on at 3; any other half-made thing is removed and made again.

Standard library only; the one external command is `python3 -m pip download`.
"""

import argparse
import ctypes
import fcntl
import fnmatch
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import namedtuple

MB = 1_000_000
CHUNK_BYTES = 1 << 20
DOWNLOAD_TRIES = 3
# Parts of torch/lib that only Python, or only CUDA, needs.
PYTHON_ONLY = ("libtorch_python.so", "libshm.so")
CUDA_ONLY = ("libtorch_cuda*.so", "libc10_cuda.so", "libtorch_nvshmem.so")
# The libraries that libtorch_cpu.so names in its dynamic section.
CPU_NVIDIA = ("libcupti.so.13", "libcudart.so.13")
# With the CPU part only, `-ltorch` means libtorch_cpu: the libtorch.so that ships names libtorch_cuda.
LIBTORCH_SO = "INPUT(libtorch_cpu.so)\n"

Wheel = namedtuple("Wheel", "file size sha256")


class SetupError(Exception):
    """What went wrong, then (further lines) what to do about it."""


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        os.makedirs(args.deps, exist_ok=True)
        with open(os.path.join(args.deps, ".setup.lock"), "w") as lock:
            take(lock)
            run(args)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; run the same command again to go on")
    except SetupError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error}\n       after putting that right, run the same command again to go on")


def parse_args():
    parser = argparse.ArgumentParser(description="see scripts/setup.sh --help")
    for name in ("deps", "cache", "lock", "profile", "arch", "stamp"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--keep-wheels", action="store_true")
    return parser.parse_args()


def take(lock):
    """Two set-ups at once (a launch and a test run, say) work one after the other."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("    another set-up is at work here; waiting for it", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


def run(args):
    done, new = os.path.join(args.deps, "libtorch"), os.path.join(args.deps, "libtorch.new")
    remove_leftovers(args)
    if not args.force and stamp_of(done) == args.stamp:
        return
    wheels = read_lock(args.lock, args.arch, args.profile)
    if args.force or stamp_of(new) != args.stamp:
        remove(new)
        check_space(args, wheels)
        paths = [obtain(wheel, args) for wheel in wheels]
        unpack(paths, new, args)
    prove_loadable(new, args)
    replace(new, done, args.deps)
    if not args.keep_wheels:
        for wheel in wheels:
            remove(os.path.join(args.cache, wheel.file))
    remove_if_empty(args.cache)
    print(f"    LibTorch is in place: {done}", file=sys.stderr)


def remove_leftovers(args):
    """Of an interrupted run: half downloads, and an older tree that had been moved aside."""
    done = os.path.join(args.deps, "libtorch")
    old = os.path.join(args.deps, "libtorch.old")
    if os.path.isdir(old) and not os.path.isdir(done) and stamp_of(os.path.join(args.deps, "libtorch.new")) is None:
        os.rename(old, done)
    remove(old)
    remove(os.path.join(args.cache, "partial"))


def read_lock(path, arch, profile):
    wheels = []
    with open(path, encoding="utf-8") as lock:
        for line in lock:
            if line.startswith("#") or not line.strip():
                continue
            row_arch, row_profile, size, sha256, file = line.split()
            if row_arch == arch and row_profile in ("cpu", profile):
                wheels.append(Wheel(file, None if size == "-" else int(size), sha256))
    if not wheels:
        raise SetupError(f"{path} lists no wheel for {arch}")
    return wheels


def check_space(args, wheels):
    """Downloads that are still to come, and the unpacked tree, with some air."""
    unpacked = 4_200 * MB if args.profile == "cuda" else 550 * MB
    missing = sum(w.size or 200 * MB for w in wheels if not os.path.exists(os.path.join(args.cache, w.file)))
    os.makedirs(args.cache, exist_ok=True)
    needs = {}
    for path, size in ((args.deps, unpacked), (args.cache, missing)):
        device = os.stat(path).st_dev
        needs[device] = (path, needs.get(device, (path, 0))[1] + size)
    for path, size in needs.values():
        free = shutil.disk_usage(path).free
        if free < size:
            raise SetupError(
                f"{path}: {free // MB} MB free, {size // MB} MB needed\n"
                "       free some space, or set UNDERSTUDY_CACHE to a folder on another disk"
            )


def obtain(wheel, args):
    """The path of a whole, checked wheel: from the cache where it is there, else downloaded."""
    path = os.path.join(args.cache, wheel.file)
    if os.path.exists(path):
        if sha256_of(path) == wheel.sha256:
            print(f"    {wheel.file}: in the cache", file=sys.stderr)
            return path
        print(f"    {wheel.file}: the cached copy is damaged; fetching it again", file=sys.stderr)
        remove(path)
    partial = os.path.join(args.cache, "partial")
    for attempt in range(1, DOWNLOAD_TRIES + 1):
        remove(partial)
        os.makedirs(partial)
        code, log = pip_download(wheel, partial)
        got = os.path.join(partial, wheel.file)
        if code == 0 and os.path.exists(got):
            if sha256_of(got) == wheel.sha256:
                os.replace(got, path)
                remove(partial)
                return path
            log = "its SHA-256 is not the one in scripts/libtorch.lock"
        if attempt < DOWNLOAD_TRIES:
            print(f"    try {attempt} of {DOWNLOAD_TRIES} failed: {last_line(log)}", file=sys.stderr)
            time.sleep(2 * attempt)
    remove(partial)
    raise SetupError(
        f"could not download {wheel.file}:\n{indent(log)}\n"
        "       check the network and pip's settings (`pip config list`), then run the same command again;\n"
        "       or put the file into the cache folder by hand, or set LIBTORCH to a LibTorch of your own"
    )


def pip_download(wheel, partial):
    """Runs pip with its temporary files inside `partial`, so that their growth is the progress."""
    name, version, _python, _abi, platforms = wheel.file[: -len(".whl")].split("-")
    name = name.replace("_", "-")
    requirement = os.path.join(partial, "requirement.txt")
    with open(requirement, "w", encoding="utf-8") as out:
        out.write(f"{name}=={version} --hash=sha256:{wheel.sha256}\n")
    command = [
        sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--progress-bar", "off",
        "--quiet", "--no-cache-dir", "--no-deps", "--only-binary=:all:", "--require-hashes", "--python-version", "3.11",
        "--implementation", "cp", "--dest", partial, "-r", requirement,
    ]  # fmt: skip
    for platform in platforms.split("."):
        command += ["--platform", platform]
    temporary = os.path.join(partial, "tmp")
    os.makedirs(temporary)
    log_path = os.path.join(partial, "pip.log")
    with open(log_path, "w+", encoding="utf-8", errors="replace") as log:
        pip = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": temporary}
        )
        bar = Progress(f"{name} {version}", wheel.size)
        try:
            while True:
                try:
                    code = pip.wait(timeout=0.3)
                    break
                except subprocess.TimeoutExpired:
                    bar.show(largest_file(partial))
        except BaseException:
            pip.terminate()
            pip.wait()
            raise
        bar.finish(code == 0)
        log.seek(0)
        return code, log.read()


def largest_file(folder):
    sizes = [0]
    for base, _, files in os.walk(folder):
        for file in files:
            try:
                sizes.append(os.stat(os.path.join(base, file)).st_size)
            except FileNotFoundError:
                pass  # pip moved it between the listing and the look
    return max(sizes)


def unpack(paths, new, args):
    jobs = []
    for path in paths:
        archive = zipfile.ZipFile(path)
        for info in archive.infolist():
            target = target_of(info.filename, args.profile)
            if target and not info.is_dir():
                jobs.append((archive, info, target))
    bar = Progress("unpacking", sum(info.file_size for _, info, _ in jobs))
    done = 0
    for archive, info, target in jobs:
        done = extract(archive, info, os.path.join(new, target), done, bar)
    bar.finish(True)
    with open(os.path.join(new, "torch", "version.py"), encoding="utf-8") as source:
        version = next(line.split("'")[1] for line in source if line.startswith("__version__"))
    write(os.path.join(new, "torch", "build-version"), version + "\n")
    if args.profile == "cpu":
        write(os.path.join(new, "torch", "lib", "libtorch.so"), LIBTORCH_SO)
    os.sync()  # the stamp must not reach the disk before what it vouches for
    write(os.path.join(new, ".complete"), args.stamp + "\n")


def target_of(name, profile):
    """Where a file of a wheel goes under libtorch/, or None where it is left out."""
    parts = name.split("/")
    if ".." in parts or name.startswith("/"):
        raise SetupError(f"a wheel holds the path {name!r}, which leads out of its folder")
    last = parts[-1]
    if parts[0].endswith(".dist-info") and last.lower().startswith(("license", "notice")):
        return f"licenses/{parts[0][: -len('.dist-info')]}/{last}"
    if parts[0] == "torch" and len(parts) > 1:
        if parts[1] in ("include", "share") or name == "torch/version.py":
            return name
        if parts[1] == "lib" and len(parts) == 3 and ".so" in last:
            left_out = PYTHON_ONLY + ((*CUDA_ONLY, "libtorch.so") if profile == "cpu" else ())
            return None if any(fnmatch.fnmatch(last, pattern) for pattern in left_out) else name
    if parts[0] == "nvidia" and len(parts) >= 4 and parts[2] == "lib" and ".so" in last:
        return name if profile == "cuda" or last in CPU_NVIDIA else None
    return None


def extract(archive, info, path, done, bar):
    """Writes one member (zipfile checks its CRC), with the mode and the time that the wheel gives it."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with archive.open(info) as source, open(path, "wb") as out:
            while chunk := source.read(CHUNK_BYTES):
                out.write(chunk)
                done += len(chunk)
                bar.show(done)
    except zipfile.BadZipFile as error:
        raise SetupError(f"{archive.filename}: {error}\n       remove that file and run the same command again") from error
    if mode := (info.external_attr >> 16) & 0o777:
        os.chmod(path, mode)
    when = time.mktime((*info.date_time, 0, 0, -1))
    os.utime(path, (when, when))
    return done


def prove_loadable(new, args):
    """The one check that counts: the dynamic linker takes it. (Not on another architecture.)"""
    if os.uname().machine not in (args.arch, args.arch.replace("aarch64", "arm64")):
        return
    library = os.path.abspath(os.path.join(new, "torch", "lib", "libtorch_cpu.so"))
    try:
        ctypes.CDLL(library)
    except OSError as error:
        raise SetupError(f"LibTorch is unpacked but does not load: {error}\n       try scripts/setup.sh --force") from error


def replace(new, done, deps):
    old = os.path.join(deps, "libtorch.old")
    if os.path.isdir(done):
        os.rename(done, old)
    os.rename(new, done)
    remove(old)


def stamp_of(folder):
    try:
        with open(os.path.join(folder, ".complete"), encoding="utf-8") as stamp:
            return stamp.read().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write(path, text):
    with open(path, "w", encoding="utf-8") as out:
        out.write(text)


def remove(path):
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.remove(path)


def remove_if_empty(folder):
    try:
        os.rmdir(folder)
    except OSError:
        pass  # it holds something, or was never made


def last_line(log):
    lines = [line for line in log.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "pip said nothing"


def indent(log):
    return "\n".join("         " + line for line in log.strip().splitlines()[-8:])


class Progress:
    """One line that grows on a terminal; elsewhere a line every few seconds, so that a log shows life."""

    EVERY_S = 5.0

    def __init__(self, what, total):
        self.what, self.total = what, total
        self.live = sys.stderr.isatty()
        self.begun = self.shown = time.monotonic()
        self.done = 0

    def show(self, done):
        self.done = max(self.done, done)
        now = time.monotonic()
        if now - self.shown < (0.1 if self.live else self.EVERY_S):
            return
        self.shown = now
        self._write(self._text(), end="" if self.live else "\n")

    def finish(self, good):
        if good and self.total:
            self.done = self.total
        elapsed = time.monotonic() - self.begun
        self._write(f"{self._text()} in {elapsed:.1f} s" if good else f"{self.what}: failed", end="\n")

    def _text(self):
        if not self.total:
            return f"{self.what}: {self.done // MB} MB"
        share = min(self.done / self.total, 1.0)
        bar = f" [{'#' * int(share * 30):<30}]" if self.live else ""
        return f"{self.what}:{bar} {share:4.0%} of {self.total / MB:.0f} MB"

    def _write(self, text, end):
        print(("\r\x1b[K    " if self.live else "    ") + text, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
