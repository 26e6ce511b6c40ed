//! The kernel of a run that names none, or its version, or a package.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use base::{Fail, Result, Why};

use crate::kernels::{self, Cache, numbers};
use crate::lab;

/// Finds a kernel: that of the build tree one stands in, or else this machine's own, or the newest that is installed, or one
/// that was pulled. Where there is none at all, one is pulled now, with a note.
///
/// # Errors
/// There is none, and none can be pulled.
pub fn find() -> Result<PathBuf> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    find_in(Path::new("."), Path::new("/"), &release).or_else(|fail| pulled(&Cache::find()?, fail))
}

/// The kernel of a tree that was built, in the directory `here`.
pub fn built(here: &Path) -> Option<PathBuf> {
    // Not any directory with a file of such a name: a build tree has its configuration.
    let tree = here.join(".config").is_file();
    let images = ["vmlinux", "arch/x86/boot/bzImage"].map(|image| here.join(image));
    images.into_iter().filter(|_| tree).find(|image| is_readable(image))
}

fn is_readable(image: &Path) -> bool {
    fs::File::open(image).is_ok_and(|_| image.is_file())
}

/// The kernel that was pulled last, or is pulled now because `fail` is all that there is otherwise.
fn pulled(cache: &Cache, fail: Fail) -> Result<PathBuf> {
    if let Some(kept) = cache.kernels().into_iter().find(|kept| kept.pulled) {
        return Ok(kept.image());
    }
    // The emulated host has no network, and its mayfly is told which kernel to take.
    if lab::is_here() || kernels::missing_tool().is_some() {
        return Err(fail);
    }
    Ok(kernels::pull_for_want(cache, "no kernel of this machine can be read")?.image())
}

fn find_in(here: &Path, top: &Path, release: &str) -> Result<PathBuf> {
    let installed = places(top, release).into_iter().chain(newest(&top.join("boot")));
    built(here).into_iter().chain(installed.filter(|image| is_readable(image))).next().ok_or_else(|| {
        Fail::new(Why::Missing, "find a kernel to run the command on")
            .because("this directory is no built kernel tree, and no kernel in /boot can be read")
            .hint("fetch one: mayfly kernel pull; or pass --kernel FILE")
    })
}

/// The kernel that a name means: that in a package, an installed or kept one by its version, or else the path itself.
///
/// # Errors
/// The package cannot be read, or there is no place to unpack it.
pub fn resolve(name: PathBuf) -> Result<PathBuf> {
    match name.extension().and_then(|end| end.to_str()) {
        Some("deb") if name.is_file() => return Ok(Cache::find()?.take(&name)?.image()),
        Some("rpm") if name.is_file() => {
            return Err(Fail::new(Why::Unsupported, format!("open kernel {}", name.display()))
                .because("packages of rpm are not unpacked here, those of Debian and Ubuntu are")
                .hint(format!(
                    "bsdtar -xf {0} or rpm2cpio {0} | cpio -idm, then pass lib/modules/VERSION/vmlinuz",
                    name.display()
                )));
        }
        _ => {}
    }
    let plain = name.to_str().filter(|text| !text.is_empty() && !text.contains('/') && !name.exists());
    let image = plain.and_then(|release| {
        let installed = places(Path::new("/"), release).into_iter().find(|image| image.is_file());
        installed.or_else(|| Some(Cache::find().ok()?.named(release)?.image()))
    });
    Ok(image.unwrap_or(name))
}

/// Where distributions have the image of a release.
fn places(top: &Path, release: &str) -> [PathBuf; 2] {
    [top.join(format!("boot/vmlinuz-{release}")), top.join(format!("lib/modules/{release}/vmlinuz"))]
}

/// The releases that are installed below `top`, with their images.
pub fn installed(top: &Path) -> Vec<(String, PathBuf)> {
    let names = |dir: PathBuf| {
        fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok())
    };
    let boot = names(top.join("boot")).filter_map(|name| name.strip_prefix("vmlinuz-").map(str::to_owned));
    let releases: BTreeSet<String> = boot.chain(names(top.join("lib/modules"))).collect();
    let image = |release: &String| places(top, release).into_iter().find(|image| image.is_file());
    releases.into_iter().filter_map(|release| Some((release.clone(), image(&release)?))).collect()
}

/// The last image by version in a directory like /boot.
fn newest(boot: &Path) -> Option<PathBuf> {
    let names = fs::read_dir(boot).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let images = names.filter(|name| name.as_encoded_bytes().starts_with(b"vmlinuz-"));
    images.max_by_key(|name: &OsString| numbers(&name.to_string_lossy())).map(|name| boot.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_kernel_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let (here, top) = (dir.path().join("here"), dir.path().join("top"));
        let put = |path: PathBuf| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "k").unwrap();
        };
        let found =
            || find_in(&here, &top, "6.9.1").map(|path| path.strip_prefix(dir.path()).unwrap().to_owned());
        let text = found().unwrap_err().to_string();
        assert!(text.contains("\n  hint: fetch one: mayfly kernel pull"), "{text}");
        put(top.join("boot/vmlinuz-6.9.0-2"));
        put(top.join("boot/vmlinuz-6.10.0-1"));
        assert_eq!(found().unwrap(), Path::new("top/boot/vmlinuz-6.10.0-1"), "the newest");
        put(top.join("lib/modules/6.9.1/vmlinuz"));
        assert_eq!(found().unwrap(), Path::new("top/lib/modules/6.9.1/vmlinuz"), "this machine's own");
        put(here.join("arch/x86/boot/bzImage"));
        assert_eq!(found().unwrap(), Path::new("top/lib/modules/6.9.1/vmlinuz"), "no build tree");
        put(here.join(".config"));
        assert_eq!(found().unwrap(), Path::new("here/arch/x86/boot/bzImage"));
    }
}
