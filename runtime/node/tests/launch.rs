//! The launcher against stand-in nodes.

#[path = "launch/disk.rs"]
mod disk;
#[path = "launch/here.rs"]
mod here;
#[path = "launch/place.rs"]
mod place;
#[path = "launch/ssh.rs"]
mod ssh;
