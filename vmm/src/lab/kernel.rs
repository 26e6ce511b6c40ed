//! The kernel of the emulated host: found or fetched once, unpacked, and kept in the cache with its modules.

use std::fs::{self, File};
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};

use base::{Doing, Fail, Result, Why};
use boot::kernel::Kernel;
use rustix::fs::{Access, FlockOperation, access, flock};
use sha2::{Digest, Sha256};

use crate::kernels::cache::{ELSEWHERE, remove};
use crate::modules::{Module, Tree, unsigned};
use crate::{builtin, kernels, log};

/// Modules without which there is no emulated host: its devices, its root file system, and what it is for.
const NEEDED: [&str; 5] = ["virtio_pci", "virtio_console", "9pnet_virtio", "9p", "kvm_amd"];
/// Modules for what commands on it may want.
const WISHED: [&str; 6] = ["virtio_rng", "overlay", "tun", "vhost_net", "vhost_vsock", "loop"];
/// Debian's package for any machine, which names the current kernel.
const PACKAGE: &str = "amd64";

/// A kernel and its modules, ready to boot, in a directory of the cache.
#[derive(Debug)]
pub struct Prepared {
    /// The image: an ELF file that QEMU enters by PVH (which saves the emulated CPU from unpacking it), or a bzImage.
    pub kernel: PathBuf,
    modules: PathBuf,
}

impl Prepared {
    fn at(dir: &Path) -> Prepared {
        Prepared { kernel: dir.join("kernel"), modules: dir.join("modules") }
    }

    /// The initial RAM disk: the agent and the modules.
    ///
    /// # Errors
    /// The cache cannot be read.
    pub fn initrd(&self) -> Result<Vec<u8>> {
        let mut modules = Vec::new();
        let reading = || format!("read the cache {}", self.modules.display());
        for entry in fs::read_dir(&self.modules).doing(Why::Host, reading)? {
            let entry = entry.doing(Why::Host, reading)?;
            modules.push((
                entry.file_name().display().to_string(),
                fs::read(entry.path()).doing(Why::Host, reading)?,
            ));
        }
        // Their names begin with their place in the order.
        modules.sort();
        builtin::initrd_with(&modules)
    }
}

/// Finds the kernel in the cache, or puts one there.
///
/// # Errors
/// This machine's kernel will not do and Debian's cannot be fetched, or the cache cannot be written.
pub fn prepare() -> Result<Prepared> {
    prepare_in(&cache()?)
}

fn prepare_in(cache: &Path) -> Result<Prepared> {
    if let Some(found) = cached(cache) {
        return Ok(found);
    }
    let making = || making(cache);
    let open = || {
        fs::create_dir_all(cache)?;
        File::create(cache.join("lock"))
    };
    // Whoever comes second waits, and then finds it.
    let lock = open().doing(Why::Denied, making).map_err(|fail| fail.hint(ELSEWHERE))?;
    flock(&lock, FlockOperation::LockExclusive).doing(Why::Host, making)?;
    if let Some(found) = cached(cache) {
        return Ok(found);
    }
    if std::io::stderr().is_terminal() {
        log::note("preparing the emulated host (once; takes about half a minute)");
    }
    let scratch = cache.join(".new");
    remove(&scratch)?;
    fs::create_dir(&scratch).doing(Why::Denied, making)?;
    let made = own(&scratch.join("own")).or_else(|_| debian(&scratch.join("debian")));
    let placed = made.and_then(|(dir, release)| {
        let place = cache.join(format!("{release}{}", suffix()));
        fs::rename(dir, &place).doing(Why::Host, || format!("fill the cache {}", place.display()))?;
        Ok(Prepared::at(&place))
    });
    remove(&scratch)?;
    placed
}

fn making(cache: &Path) -> String {
    format!("make the cache {}", cache.display())
}

/// Whether the cache holds a kernel, or one could be put there. Writes nothing.
///
/// # Errors
/// It cannot; the remedy is told.
pub fn check_cache() -> Result<PathBuf> {
    let cache = cache()?;
    check_cache_in(&cache).map(|()| cache)
}

fn check_cache_in(cache: &Path) -> Result<()> {
    if cached(cache).is_some() {
        return Ok(());
    }
    let there = cache.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let denied = |cause: std::io::Error| {
        let fail = Fail::new(Why::Denied, making(cache));
        // Which of the directories on the way it is, where that is not plain.
        if there == cache {
            fail.because(cause)
        } else {
            fail.because(format!("in {}: {cause}", there.display()))
        }
        .hint(ELSEWHERE)
    };
    if !there.is_dir() {
        return Err(denied(ErrorKind::NotADirectory.into()));
    }
    access(there, Access::WRITE_OK | Access::EXEC_OK).map_err(|cause| denied(cause.into()))
}

/// Whether a kernel is in the cache, on this machine, or can be fetched.
///
/// # Errors
/// None of it; the remedy is told.
pub fn check_source() -> Result<()> {
    let (image, tree) = own_files();
    let own = image.is_some_and(|image| File::open(image).is_ok()) && tree.join("kernel").is_dir();
    if own || cache().is_ok_and(|cache| cached(&cache).is_some()) {
        return Ok(());
    }
    match kernels::missing_tool() {
        None => Ok(()),
        Some(tool) => {
            Err(without(format!("{tool} is not installed, and this machine's own kernel will not do")))
        }
    }
}

/// The directory for what can be made again.
fn cache() -> Result<PathBuf> {
    kernels::cache::home().map(|home| home.join("lab"))
}

/// Ends the name of a cached kernel, so that one with other modules is not taken for it.
fn suffix() -> String {
    let digest = Sha256::digest(format!("2 {NEEDED:?} {WISHED:?}"));
    digest.iter().take(4).fold(String::from("."), |text, byte| format!("{text}{byte:02x}"))
}

/// A kernel that is in the cache: this machine's, or else the last by name.
fn cached(cache: &Path) -> Option<Prepared> {
    let (suffix, own) = (suffix(), format!("{}{}", release(), suffix()));
    let names = fs::read_dir(cache).ok()?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let name =
        names.filter(|name| name.ends_with(&suffix)).max_by_key(|name| (*name == own, name.clone()))?;
    Some(Prepared::at(&cache.join(name)))
}

fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// Prepares this machine's own kernel in `dir`: the directory and the release.
fn own(dir: &Path) -> Result<(PathBuf, String)> {
    let release = release();
    let (image, tree) = own_files();
    let image = image.ok_or_else(|| Fail::new(Why::Missing, format!("find kernel {release}")))?;
    store(&image, &tree, dir)?;
    Ok((dir.to_owned(), release))
}

/// Image and modules of this machine's own kernel, as distributions lay them.
fn own_files() -> (Option<PathBuf>, PathBuf) {
    let release = release();
    let tree = Path::new("/lib/modules").join(&release);
    let images = [PathBuf::from(format!("/boot/vmlinuz-{release}")), tree.join("vmlinuz")];
    (images.into_iter().find(|image| image.is_file()), tree)
}

/// Fetches and prepares Debian's kernel in `dir`: the directory with it, and its release.
fn debian(dir: &Path) -> Result<(PathBuf, String)> {
    let root = dir.join("root");
    fs::create_dir_all(&root).doing(Why::Host, || format!("make {}", root.display()))?;
    let release = kernels::fetch_into(PACKAGE, &root).map_err(|fail| without(fail.summary()))?;
    let (image, ready) = (root.join(format!("boot/vmlinuz-{release}")), dir.join("ready"));
    store(&image, &root.join("lib/modules").join(&release), &ready)?;
    Ok((ready, release))
}

fn without(cause: String) -> Fail {
    Fail::new(Why::Missing, "fetch a kernel for the emulated host").because(cause).hint(format!(
        "on Debian run apt-get update; elsewhere install a kernel that has {}, with its image readable in /boot",
        NEEDED.join(", ")
    ))
}

/// Puts a kernel and the modules it needs into `dir`.
fn store(image: &Path, tree: &Path, dir: &Path) -> Result<()> {
    let tree = Tree::open(tree)?;
    let mut modules: Vec<Module> = Vec::new();
    for name in NEEDED {
        tree.add(name, &mut modules)?;
    }
    for name in WISHED {
        if let Err(fail) = tree.add(name, &mut modules) {
            ::log::info!("on the emulated host: {fail}");
        }
    }
    let writing = || format!("write {}", dir.display());
    fs::create_dir_all(dir.join("modules")).doing(Why::Host, writing)?;
    for (place, module) in modules.into_iter().enumerate() {
        let path = dir.join(format!("modules/{place:03}-{}.ko", module.name));
        fs::write(path, unsigned(module.content)).doing(Why::Host, writing)?;
    }
    let kernel = dir.join("kernel");
    let mut out = std::io::BufWriter::new(File::create(&kernel).doing(Why::Host, writing)?);
    if Kernel::open(image)?.write_pvh_elf(&mut out)? {
        out.flush().doing(Why::Host, writing)
    } else {
        fs::copy(image, &kernel).map(drop).doing(Why::Host, || format!("copy kernel {}", image.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machines_kernel_is_preferred_and_strangers_are_not_taken() {
        let cache = tempfile::tempdir().unwrap();
        assert!(cached(cache.path()).is_none());
        let add = |name: String| fs::create_dir(cache.path().join(name)).unwrap();
        let found = || cached(cache.path()).unwrap().kernel.display().to_string();
        add("6.1.0-1.00000000".into());
        add(".new".into());
        assert!(cached(cache.path()).is_none(), "other modules");
        add(format!("6.1.0-1{}", suffix()));
        add(format!("6.1.0-2{}", suffix()));
        assert!(found().contains("/6.1.0-2."), "{}", found());
        add(format!("{}{}", release(), suffix()));
        assert!(found().contains(&release()), "{}", found());
    }

    #[test]
    fn a_cache_that_cannot_be_made_is_told_with_the_remedy_before_and_when_it_is_needed() {
        let place = tempfile::tempdir().unwrap();
        assert!(check_cache_in(&place.path().join("a/b")).is_ok());
        assert!(!place.path().join("a").exists(), "the check writes nothing");
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        let told = check_cache_in(&file.join("b/c")).unwrap_err().summary();
        assert!(told.starts_with(&format!("make the cache {0}/b/c: in {0}: ", file.display())), "{told}");
        for fail in [check_cache_in(&file.join("b")).err(), prepare_in(&file.join("b")).err()] {
            let fail = fail.unwrap();
            assert!(fail.summary().to_lowercase().ends_with("not a directory"), "{fail}");
            assert_eq!(fail.remedy(), Some(ELSEWHERE));
        }
    }
}
