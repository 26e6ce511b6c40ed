//! The kernel of the emulated host: found or fetched once, unpacked, and kept in the cache with its modules.

use std::fs::{self, File};
use std::io::{ErrorKind, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base::sys::children::die_with_parent;
use base::{Doing, Fail, Result, Why};
use boot::kernel::Kernel;
use rustix::fs::{Access, FlockOperation, access, flock};
use sha2::{Digest, Sha256};

use super::qemu::in_path;
use crate::modules::{Module, Tree, unsigned};
use crate::{builtin, log};

/// Modules without which there is no emulated host: its devices, its root file system, and what it is for.
const NEEDED: [&str; 5] = ["virtio_pci", "virtio_console", "9pnet_virtio", "9p", "kvm_amd"];
/// Modules for what commands on it may want.
const WISHED: [&str; 6] = ["virtio_rng", "overlay", "tun", "vhost_net", "vhost_vsock", "loop"];
/// Debian's package for any machine, which names the current kernel.
const PACKAGE: &str = "linux-image-amd64";

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

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Fail::new(Why::Host, format!("remove {}", dir.display())).because(error))
        }
        _ => Ok(()),
    }
}

/// What helps where the cache cannot be.
const ELSEWHERE: &str = "set XDG_CACHE_HOME to a directory that can be written";

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
    let tools = ["apt-get", "apt-cache", "dpkg-deb"];
    match tools.into_iter().find(|tool| in_path(tool).is_none()) {
        None => Ok(()),
        Some(tool) => {
            Err(without(format!("{tool} is not installed, and this machine's own kernel will not do")))
        }
    }
}

/// The directory for what can be made again.
fn cache() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let top = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
    top.map(|top| top.join("mayfly/lab")).ok_or_else(|| {
        Fail::new(Why::Missing, "find the cache for the emulated host")
            .because("neither XDG_CACHE_HOME nor HOME is set")
            .hint(ELSEWHERE)
    })
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
    fs::create_dir(dir).doing(Why::Host, || format!("make {}", dir.display()))?;
    let package = match newest() {
        Some(package) => package,
        None => {
            if rustix::process::geteuid().is_root() {
                run(Command::new("apt-get").args(["update", "-q"]))?;
            }
            newest().ok_or_else(|| without(format!("apt knows no package {PACKAGE}")))?
        }
    };
    // A sandbox user could not write here.
    let root = ["-o", "APT::Sandbox::User=root"];
    run(Command::new("apt-get").args(["download", "-q"]).args(root).arg(&package).current_dir(dir))?;
    let looking = || format!("look into {}", dir.display());
    let mut files = fs::read_dir(dir).doing(Why::Host, looking)?.flatten().map(|entry| entry.path());
    let file = files.find(|path| path.extension().is_some_and(|end| end == "deb"));
    let file = file.ok_or_else(|| without(format!("apt-get left no package {package}")))?;
    run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(dir.join("root")))?;
    let release = package.strip_prefix("linux-image-").unwrap_or(&package).to_owned();
    let image = dir.join(format!("root/boot/vmlinuz-{release}"));
    let ready = dir.join("ready");
    store(&image, &dir.join("root/lib/modules").join(&release), &ready)?;
    Ok((ready, release))
}

/// The package that Debian's package for any machine depends on.
fn newest() -> Option<String> {
    let said = Command::new("apt-cache").args(["depends", PACKAGE]).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    let mut depends = text.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    depends.find(|name| name.starts_with("linux-image-")).map(str::to_owned)
}

fn without(cause: String) -> Fail {
    Fail::new(Why::Missing, "fetch a kernel for the emulated host").because(cause).hint(format!(
        "on Debian run apt-get update; elsewhere install a kernel that has {}, with its image readable in /boot",
        NEEDED.join(", ")
    ))
}

/// Runs a program to its end; what it says is told only if it fails.
fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().display().to_string();
    die_with_parent(command);
    let output =
        command.stdin(Stdio::null()).output().map_err(|cause| without(format!("run {name}: {cause}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(without(format!("{name} ended with {}: {said}", output.status)))
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
