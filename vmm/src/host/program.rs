//! Programs of the host.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// The program of that name in the directories of `PATH`, if this user may run it.
pub fn in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let runs = |file: &PathBuf| {
        file.metadata().is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
    };
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(runs)
}
