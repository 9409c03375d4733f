//! Packed weights that the engines of a host share: one file in shared memory per model and packing, made once, mapped by all.
//!
//! ```text
//!  0        8          12        16             24            56                88           96            4096
//!  +--------+----------+---------+--------------+-------------+-----------------+------------+-------------+---------+
//!  | magic  | version  |   0     | payload: u64 | key (32)    | value hash (32) | checksum   | zeros       | payload |
//!  +--------+----------+---------+--------------+-------------+-----------------+------------+-------------+---------+
//! ```
//!
//! The file lies in `/dev/shm`: pages of a disk's cache cannot be huge ([`crate::mapping`]), and reading weights through small pages costs a
//! quarter of the memory's bandwidth. It is written under another name and renamed when it is whole, so a file of this name is a whole one; its checksum
//! is compared all the same. Users hold a shared lock on it, which is how [`sweep`] knows what nobody uses.
//!
//! Invariant: without shared memory (none there, or too small) a private copy is made: the same bits, but not shared.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use understudy_kernels::Pool;
use understudy_kernels::buffer::{Buffer, SharedMemory};

use crate::checksum::checksum;
use crate::mapping::Mapping;

const MAGIC: &[u8; 8] = b"USPKWGT\0";
/// Raised whenever the layout of a packed image changes.
const VERSION: u32 = 1;
/// One page: the payload is aligned for anything.
const HEADER_BYTES: usize = 4096;
/// A segment that nobody has used for so long is not waited for by an engine that is being restarted.
pub const IDLE: Duration = Duration::from_secs(600);
/// How long an engine waits for another one that packs the same weights, before it packs a copy of its own.
const MAKER_PATIENCE: Duration = Duration::from_secs(120);
const MAKER_POLL: Duration = Duration::from_millis(20);
/// Ending of the files that makers lock. They are empty, and stay.
const LOCK: &str = "lock";
/// Share of the free shared memory that a new segment may take.
const MOST_OF_FREE: f64 = 0.9;

/// What identifies a packed image: the checkpoint's files, the specification, the formats.
pub type Key = [u8; 32];

/// A packed image, shared or not.
pub struct Segment {
    pub memory: SharedMemory,
    /// Where the payload starts in `memory`.
    pub payload: usize,
    /// The checkpoint's value hash, found when it was packed.
    pub value_hash: [u8; 32],
    pub origin: Origin,
}

/// Where a segment came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Found in shared memory.
    Found,
    /// Packed now, into shared memory.
    Made,
    /// Packed now, into this process's own memory.
    Private,
}

/// Fills an image and returns the checkpoint's value hash.
pub type Pack<'a, E> = dyn FnMut(&mut [u8]) -> Result<[u8; 32], E> + 'a;

/// The directory of this user's segments; `None` where there is no shared memory.
#[must_use]
pub fn directory() -> Option<PathBuf> {
    if !cfg!(target_os = "linux") || !Path::new("/dev/shm").is_dir() {
        return None;
    }
    // SAFETY: a query without arguments.
    let user = unsafe { libc::geteuid() };
    Some(PathBuf::from(format!("/dev/shm/understudy-{user}")))
}

/// The image for `key` of `bytes` bytes: found, or made by `pack`. `directory` is where segments lie; `None` makes a private one.
///
/// # Errors
/// What `pack` says. Trouble with shared memory is no error: the image is private then.
pub fn open_or_pack<E>(
    directory: Option<&Path>,
    key: &Key,
    bytes: usize,
    pool: &Pool,
    pack: &mut Pack<'_, E>,
) -> Result<Segment, E> {
    if let Some(directory) = directory
        && prepare(directory).is_ok()
        && let Ok(_one_maker) = lock_for_making(directory, key)
    {
        let path = directory.join(file_name(key));
        if let Ok(segment) = open(&path, key, bytes, pool) {
            return Ok(segment);
        }
        if let Ok(image) = Image::create(directory, key, bytes) {
            return image.fill(&path, key, pool, pack);
        }
    }
    let mut memory = Buffer::<u8>::zeroed(bytes);
    let value_hash = pack(&mut memory)?;
    Ok(Segment {
        memory: Arc::new(memory),
        payload: 0,
        value_hash,
        origin: Origin::Private,
    })
}

/// Removes this user's segments that no process has mapped and that were last opened at least `idle` ago. Returns how many bytes that freed.
pub fn sweep(directory: &Path, idle: Duration) -> u64 {
    let mut freed = 0;
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|ending| ending == LOCK) {
            continue;
        }
        let Ok(file) = File::open(&path) else {
            continue;
        };
        let Ok(metadata) = file.metadata() else {
            continue;
        };
        let age = metadata.modified().ok().and_then(|at| at.elapsed().ok());
        if age.is_none_or(|age| age < idle) || !try_lock(&file, libc::LOCK_EX) {
            continue;
        }
        if std::fs::remove_file(&path).is_ok() {
            freed += metadata.blocks() * 512;
        }
    }
    freed
}

fn file_name(key: &Key) -> String {
    let hex: String = key[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}.packed")
}

/// The directory must be ours alone: whoever can write there can change what engines compute.
fn prepare(directory: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    match std::fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let metadata = std::fs::symlink_metadata(directory)?;
    // SAFETY: a query without arguments.
    let ours = metadata.is_dir() && metadata.uid() == unsafe { libc::geteuid() };
    if !ours || metadata.permissions().mode() & 0o077 != 0 {
        return Err(io::Error::from(io::ErrorKind::PermissionDenied));
    }
    Ok(())
}

/// Two engines that start together pack once: the second waits, and finds the first one's file. It does not wait for ever: a maker that is
/// stopped, or whose file system hangs, must not keep all others from starting.
fn lock_for_making(directory: &Path, key: &Key) -> io::Result<File> {
    let path = directory.join(format!("{}.{LOCK}", file_name(key)));
    let deadline = Instant::now() + MAKER_PATIENCE;
    loop {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)?;
        // A maker that dies drops its lock. There is no wait for it with a deadline, so it is asked for.
        if try_lock(&file, libc::LOCK_EX) {
            // Removed meanwhile, it is another file than the next one's.
            if file.metadata()?.nlink() > 0 {
                return Ok(file);
            }
            continue;
        }
        if Instant::now() >= deadline {
            return Err(io::Error::from(io::ErrorKind::TimedOut));
        }
        std::thread::sleep(MAKER_POLL);
    }
}

fn try_lock(file: &File, kind: i32) -> bool {
    // SAFETY: the descriptor is open.
    unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) == 0 }
}

/// A mapping, and the file whose lock says that it is in use.
struct Mapped {
    map: Mapping,
    _in_use: File,
}

impl Deref for Mapped {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.map
    }
}

fn invalid() -> io::Error {
    io::Error::from(io::ErrorKind::InvalidData)
}

/// Maps a segment that is there. A damaged one is removed.
fn open(path: &Path, key: &Key, bytes: usize, pool: &Pool) -> io::Result<Segment> {
    let file = OpenOptions::new().read(true).open(path)?;
    // Swept between opening and locking, it would be nobody's and still take memory.
    if !try_lock(&file, libc::LOCK_SH) || file.metadata()?.nlink() == 0 {
        return Err(invalid());
    }
    if file.metadata()?.len() != (HEADER_BYTES + bytes) as u64 {
        let _ = std::fs::remove_file(path);
        return Err(invalid());
    }
    // SAFETY: files of this directory are ours, and never change once they have this name.
    let map = unsafe { Mapping::of(&file, HEADER_BYTES + bytes, false)? };
    map.collapse();
    let header = Header::read(&map);
    if header.key != *key
        || header.payload != bytes as u64
        || header.checksum != checksum(pool, &map[HEADER_BYTES..])
    {
        let _ = std::fs::remove_file(path);
        return Err(invalid());
    }
    let _ = file.set_modified(std::time::SystemTime::now());
    Ok(Segment {
        memory: Arc::new(Mapped { map, _in_use: file }),
        payload: HEADER_BYTES,
        value_hash: header.value_hash,
        origin: Origin::Found,
    })
}

struct Header {
    payload: u64,
    key: Key,
    value_hash: [u8; 32],
    checksum: u64,
}

impl Header {
    /// All zeros, which no key is, if it is no header of this version.
    fn read(bytes: &[u8]) -> Self {
        let array = |at: usize| -> [u8; 32] { bytes[at..at + 32].try_into().expect("32 bytes") };
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let known = &bytes[..8] == MAGIC && bytes[8..12] == VERSION.to_le_bytes();
        Self {
            payload: number(16),
            key: if known { array(24) } else { [0; 32] },
            value_hash: array(56),
            checksum: number(88),
        }
    }

    fn write(&self, bytes: &mut [u8]) {
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.payload.to_le_bytes());
        bytes[24..56].copy_from_slice(&self.key);
        bytes[56..88].copy_from_slice(&self.value_hash);
        bytes[88..96].copy_from_slice(&self.checksum.to_le_bytes());
    }
}

/// A segment in the making; its file goes away unless it gets its name.
struct Image {
    map: Mapping,
    /// Holds the lock that says that it is in use.
    _file: File,
    temporary: PathBuf,
    named: bool,
}

impl Image {
    /// Memory for an image, all of it there: a write to shared memory that has run out would kill the process.
    fn create(directory: &Path, key: &Key, bytes: usize) -> io::Result<Self> {
        let whole = HEADER_BYTES + bytes;
        if whole as f64 > free_bytes(directory)? as f64 * MOST_OF_FREE {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        let temporary = directory.join(format!("{}.{}.new", file_name(key), std::process::id()));
        let _ = std::fs::remove_file(&temporary);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        // From now on it is in use, however long the packing takes.
        let locked = try_lock(&file, libc::LOCK_SH);
        let made = file.set_len(whole as u64).and_then(|()| {
            if !locked {
                return Err(invalid());
            }
            // SAFETY: nobody else knows the file yet.
            let map = unsafe { Mapping::of(&file, whole, true)? };
            map.populate()?;
            map.collapse();
            Ok(map)
        });
        match made {
            Ok(map) => Ok(Self {
                map,
                _file: file,
                temporary,
                named: false,
            }),
            Err(error) => {
                let _ = std::fs::remove_file(&temporary);
                Err(error)
            }
        }
    }

    /// Packs, seals, names.
    fn fill<E>(
        mut self,
        path: &Path,
        key: &Key,
        pool: &Pool,
        pack: &mut Pack<'_, E>,
    ) -> Result<Segment, E> {
        let (header, payload) = self.map.split_at_mut(HEADER_BYTES);
        let value_hash = pack(payload)?;
        Header {
            payload: payload.len() as u64,
            key: *key,
            value_hash,
            checksum: checksum(pool, payload),
        }
        .write(header);
        // Without its name it is a segment of ours alone, and gone with the mapping.
        let shared = std::fs::rename(&self.temporary, path).is_ok();
        self.named = shared;
        let origin = if shared {
            Origin::Made
        } else {
            Origin::Private
        };
        let memory = Sealed { image: self };
        Ok(Segment {
            memory: Arc::new(memory),
            payload: HEADER_BYTES,
            value_hash,
            origin,
        })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if !self.named {
            let _ = std::fs::remove_file(&self.temporary);
        }
    }
}

/// An image that is no longer written to.
struct Sealed {
    image: Image,
}

impl Deref for Sealed {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.image.map
    }
}

fn free_bytes(directory: &Path) -> io::Result<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(directory.as_os_str().as_bytes())?;
    // SAFETY: a path that ends with zero, and room for the answer.
    unsafe {
        let mut answer: libc::statvfs = std::mem::zeroed();
        match libc::statvfs(path.as_ptr(), &raw mut answer) {
            0 => Ok(answer.f_bavail * answer.f_frsize),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Never = std::convert::Infallible;

    fn directory(name: &str) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("understudy-segment-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        path
    }

    fn get(directory: Option<&Path>, fill: u8, packed: &mut u32) -> Segment {
        let mut pack = |image: &mut [u8]| {
            *packed += 1;
            image.fill(fill);
            Ok::<_, Never>([fill; 32])
        };
        match open_or_pack(directory, &[7; 32], 300_000, &Pool::new(2), &mut pack) {
            Ok(segment) => segment,
            Err(never) => match never {},
        }
    }

    #[test]
    fn the_second_one_finds_what_the_first_one_made() {
        let directory = directory("shared");
        let mut packed = 0;
        let first = get(Some(&directory), 5, &mut packed);
        let second = get(Some(&directory), 6, &mut packed);
        assert_eq!(
            (first.origin, second.origin, packed),
            (Origin::Made, Origin::Found, 1)
        );
        assert_eq!(second.value_hash, [5; 32]);
        assert_eq!(second.memory[second.payload..], [5; 300_000]);
        assert_eq!(second.payload % 64, 0);
        // In use: not swept, however old.
        assert_eq!(sweep(&directory, Duration::ZERO), 0);
        drop((first, second));
        assert!(sweep(&directory, Duration::ZERO) >= 300_000);
        assert_eq!(get(Some(&directory), 8, &mut packed).origin, Origin::Made);
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn an_idle_one_is_found_again_before_it_is_swept() {
        let directory = directory("idle");
        let mut packed = 0;
        drop(get(Some(&directory), 5, &mut packed));
        let path = directory.join(file_name(&[7; 32]));
        let long_ago = std::time::SystemTime::now() - 2 * IDLE;
        File::open(&path).unwrap().set_modified(long_ago).unwrap();
        let again = get(Some(&directory), 5, &mut packed);
        assert_eq!((again.origin, packed), (Origin::Found, 1));
        assert_eq!(sweep(&directory, IDLE), 0);
        drop(again);
        File::open(&path).unwrap().set_modified(long_ago).unwrap();
        assert!(sweep(&directory, IDLE) > 0);
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_damaged_one_is_made_again() {
        let directory = directory("damaged");
        let mut packed = 0;
        drop(get(Some(&directory), 5, &mut packed));
        let path = directory.join(file_name(&[7; 32]));
        for damage in [0, 9, 30, 90, HEADER_BYTES + 1234, HEADER_BYTES + 299_999] {
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[damage] ^= 1;
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(
                get(Some(&directory), 5, &mut packed).origin,
                Origin::Made,
                "{damage}"
            );
        }
        std::fs::write(&path, b"short").unwrap();
        assert_eq!(get(Some(&directory), 5, &mut packed).origin, Origin::Made);
        assert_eq!(get(Some(&directory), 5, &mut packed).origin, Origin::Found);
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn without_a_directory_of_our_own_the_copy_is_private() {
        let mut packed = 0;
        assert_eq!(get(None, 5, &mut packed).origin, Origin::Private);
        let open = directory("open");
        std::fs::create_dir(&open).unwrap();
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(0o777)).unwrap();
        assert_eq!(get(Some(&open), 5, &mut packed).origin, Origin::Private);
        assert_eq!(packed, 2);
        std::fs::remove_dir_all(open).unwrap();
    }

    #[test]
    fn a_maker_that_fails_leaves_nothing() {
        let directory = directory("failed");
        let mut pack = |_: &mut [u8]| Err("no such tensor");
        let failed = open_or_pack(Some(&directory), &[7; 32], 5000, &Pool::new(1), &mut pack);
        assert_eq!(failed.err(), Some("no such tensor"));
        let left: Vec<_> = std::fs::read_dir(&directory).unwrap().flatten().collect();
        assert!(
            left.iter()
                .all(|entry| entry.file_name().to_string_lossy().ends_with(".lock"))
        );
        std::fs::remove_dir_all(directory).unwrap();
    }
}
