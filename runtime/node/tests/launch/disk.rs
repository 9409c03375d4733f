//! A node and a full disk.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::place::{Launcher, Place, signal};

/// A disk in memory, or `None` where this user may not make one.
fn small_disk(place: &Place) -> Option<SmallDisk> {
    let folder = place.run_dir();
    fs::create_dir_all(&folder).expect("made");
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"])
        .arg(&folder)
        .stderr(Stdio::null())
        .status();
    mounted
        .is_ok_and(|status| status.success())
        .then_some(SmallDisk(folder))
}

struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Takes all the room that is left.
    fn fill(&self) {
        let mut file = fs::File::create(self.0.join("filler")).expect("made");
        while std::io::Write::write_all(&mut file, &[0; 512]).is_ok() {}
    }

    fn free(&self) {
        fs::remove_file(self.0.join("filler")).expect("removed");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A node is not given up, and no process is started that could not be found again.
#[test]
fn a_node_outlives_a_full_disk() {
    let place = Place::new("full");
    let Some(disk) = small_disk(&place) else {
        // scripts/test.sh tells so at its end.
        eprintln!("SKIPPED: only root can mount a small disk");
        return;
    };
    let mut launcher = Launcher::start(&mut place.up());
    launcher.until("stop      Ctrl-C");
    disk.fill();
    // Removed with its process, the pid file would make room for the next one.
    let _held = fs::File::open(place.run_dir().join("b.pid")).expect("there");
    signal(place.pid("b").expect("it runs"), "KILL");
    launcher.until("starting it again in 5.0 s");
    let told = launcher.seen.lines().last().expect("a line").to_owned();
    assert!(told.contains("b.pid: No space left on device"), "{told}");
    assert_eq!(place.processes().len(), 1, "b is not there");
    disk.free();
    launcher.until("node b: started (pid");
    launcher.signal("INT");
    launcher.end();
    place.assert_nothing_is_left();
}
