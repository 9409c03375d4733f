//! Checks that look at more than one key, or at the disk. They run after reading, on whatever could be read, so that
//! their problems stand in the same report as typing errors.

mod addresses;
mod advice;
mod limits;
mod paths;
mod topology;

use crate::load::{ClusterConfig, LoadOptions};
use crate::problem::Warning;
use crate::schema::Reader;

/// Reports problems to the reader, and returns warnings.
pub(crate) fn check(
    config: &ClusterConfig,
    reader: &mut Reader<'_>,
    options: &LoadOptions,
) -> Vec<Warning> {
    topology::check(config, reader);
    limits::check(config, reader);
    paths::check(config, reader, &options.paths);
    advice::warnings(config, reader)
}
