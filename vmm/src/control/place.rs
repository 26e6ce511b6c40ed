//! The runtime directory of a user: where the VMs that can be reached have theirs.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use base::{Doing, Fail, Result, Why};
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::geteuid;

/// Where it can be, the first that serves. `xdg` is the user's runtime directory by its variable, `own_host` that this is an
/// emulated host: its files are those of the machine around it, but for `/run`, and nobody there must find what is here.
///
/// The directory of a login goes with the last session of its user, so for root, who has a better place, it is none of the
/// first, whatever the variable says.
fn candidates(xdg: Option<PathBuf>, user: u32, own_host: bool) -> Vec<PathBuf> {
    let shared = PathBuf::from("/run/mayfly");
    if own_host {
        return vec![shared];
    }
    let login = PathBuf::from(format!("/run/user/{user}"));
    let chosen = xdg.filter(|xdg| xdg.is_absolute() && *xdg != login && is_own(xdg, user));
    let login = is_own(&login, user).then_some(login);
    let system = (user == 0).then_some(shared);
    let last = PathBuf::from(format!("/tmp/mayfly-{user}"));
    let beneath = |above: PathBuf| above.join("mayfly");
    chosen.map(beneath).into_iter().chain(system).chain(login.map(beneath)).chain([last]).collect()
}

/// Whether it is a directory of this user's.
fn is_own(path: &Path, user: u32) -> bool {
    rustix::fs::stat(path).is_ok_and(|about| {
        about.st_uid == user && FileType::from_raw_mode(about.st_mode) == FileType::Directory
    })
}

fn all() -> Vec<PathBuf> {
    let xdg = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    candidates(xdg, geteuid().as_raw(), crate::lab::is_here())
}

/// The runtime directory, made if it is missing.
///
/// # Errors
/// There is no place for it.
pub fn make() -> Result<PathBuf> {
    let mut refusal = None;
    for path in all() {
        match rustix::fs::mkdir(&path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => return Ok(path),
            Err(cause) => refusal = Some((path, cause)),
        }
    }
    let Some((path, cause)) = refusal else {
        return Err(Fail::new(Why::Host, "make a runtime directory").because("there is no place for it"));
    };
    Err(Fail::new(Why::Host, format!("make the runtime directory {}", path.display()))
        .because(std::io::Error::from(cause))
        .hint("set XDG_RUNTIME_DIR to a directory of yours"))
}

/// The runtime directories that are there: after a login or a logout the next VM has another than the last.
pub fn find() -> Vec<PathBuf> {
    all().into_iter().filter(|path| rustix::fs::lstat(path).is_ok()).collect()
}

/// Opens a runtime directory; `None`: it is not there. In `/tmp` anybody can have made it, or a link in its place.
///
/// # Errors
/// It is not to be trusted.
pub fn open(path: &Path) -> Result<Option<OwnedFd>> {
    let doing = || format!("use the runtime directory {}", path.display());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = match rustix::fs::open(path, flags, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        open => open.doing(Why::Denied, doing)?,
    };
    let about = rustix::fs::fstat(&open).doing(Why::Host, doing)?;
    match fault(&about, geteuid().as_raw()) {
        None => Ok(Some(open)),
        Some(fault) => Err(Fail::new(Why::Denied, doing())
            .because(fault)
            .hint("remove it, or set XDG_RUNTIME_DIR to a directory of yours")),
    }
}

/// Why a directory is not to be trusted.
fn fault(about: &Stat, user: u32) -> Option<String> {
    if about.st_uid != user {
        return Some(format!("it belongs to user {}", about.st_uid));
    }
    (about.st_mode & 0o077 != 0).then(|| "others may enter it".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_session_comes_first_if_it_is_ours() {
        let own = tempfile::tempdir().unwrap();
        let user = geteuid().as_raw();
        let found = candidates(Some(own.path().into()), user, false);
        assert_eq!(found[0], own.path().join("mayfly"));
        assert_eq!(found.last().unwrap(), &PathBuf::from(format!("/tmp/mayfly-{user}")));
        let foreign = candidates(Some(own.path().into()), user + 1, false);
        assert_eq!(foreign, [PathBuf::from(format!("/tmp/mayfly-{}", user + 1))], "sudo keeps the variable");
        let root = candidates(Some("/run/user/0".into()), 0, false);
        assert_eq!(root[0], PathBuf::from("/run/mayfly"), "what goes with a login is not for VMs of root's");
        assert_eq!(candidates(Some("run".into()), 7, false), [PathBuf::from("/tmp/mayfly-7")]);
        assert_eq!(candidates(Some(own.path().into()), user, true), [PathBuf::from("/run/mayfly")]);
    }

    #[test]
    fn what_others_could_have_made_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("mayfly");
        std::fs::create_dir(&path).unwrap();
        let mode = |bits| std::fs::set_permissions(&path, PermissionsExt::from_mode(bits)).unwrap();
        mode(0o755);
        let told = open(&path).unwrap_err().to_string();
        assert!(told.contains(": others may enter it\n  hint: remove it"), "{told}");
        mode(0o700);
        assert!(open(&path).unwrap().is_some());
        let link = place.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(open(&link).unwrap_err().to_string().starts_with("use the runtime directory "));
        let about = rustix::fs::stat(&path).unwrap();
        assert_eq!(fault(&about, about.st_uid + 1).unwrap(), format!("it belongs to user {}", about.st_uid));
    }
}
