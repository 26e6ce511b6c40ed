//! The kernel of a run that names none, or only its version.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use base::{Fail, Result, Why};

/// Finds a kernel: that of the build tree one stands in, or else this machine's own, or else the newest installed.
///
/// # Errors
/// There is none.
pub fn find() -> Result<PathBuf> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    find_in(Path::new("."), Path::new("/"), &release)
}

fn find_in(here: &Path, top: &Path, release: &str) -> Result<PathBuf> {
    // Not any directory with a file of such a name: a build tree has its configuration.
    let built = ["vmlinux", "arch/x86/boot/bzImage"].map(|image| here.join(image));
    let tree = here.join(".config").is_file();
    let built = built.into_iter().filter(|_| tree);
    let installed = places(top, release).into_iter().chain(newest(&top.join("boot")));
    built.chain(installed).find(|image| fs::File::open(image).is_ok_and(|_| image.is_file())).ok_or_else(
        || {
            Fail::new(Why::Missing, "find a kernel to run the command on")
                .because("this directory is no built kernel tree, and no kernel in /boot can be read")
                .hint("pass --kernel FILE; on Debian: apt-get install linux-image-cloud-amd64")
        },
    )
}

/// Takes the version of an installed kernel for the kernel.
pub fn by_version(name: PathBuf) -> PathBuf {
    let plain = name.to_str().filter(|text| !text.contains('/') && !name.exists());
    let image =
        plain.and_then(|release| places(Path::new("/"), release).into_iter().find(|image| image.is_file()));
    image.unwrap_or(name)
}

/// Where distributions have the image of a release.
fn places(top: &Path, release: &str) -> [PathBuf; 2] {
    [top.join(format!("boot/vmlinuz-{release}")), top.join(format!("lib/modules/{release}/vmlinuz"))]
}

/// The last image by version in a directory like /boot.
fn newest(boot: &Path) -> Option<PathBuf> {
    let names = fs::read_dir(boot).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let images = names.filter(|name| name.as_encoded_bytes().starts_with(b"vmlinuz-"));
    images.max_by_key(numbers).map(|name| boot.join(name))
}

/// The numbers in a name, by which versions are compared: 6.10 is later than 6.9.
fn numbers(name: &OsString) -> Vec<u64> {
    let name = name.to_string_lossy();
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
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
        assert!(text.contains("\n  hint: pass --kernel FILE"), "{text}");
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
