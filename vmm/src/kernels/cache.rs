//! Kernels that are kept: each unpacked once, in a directory named by its release and the digest of its package.
//!
//! ```text
//! kernels/lock                           whoever adds or removes one holds it
//! kernels/new/                           one that is being made; what a killed process left there goes with the next
//! kernels/RELEASE.DIGEST/about.json      what it is, with boot/ and lib/modules/ beside it
//! kernels/fetch-PID-N/                   what a process is fetching, which has it locked
//! kernels/files/HEX                      a package that was looked at before: the name of its kernel
//! ```

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use base::fail::unreadable;
use base::host::open_to_read;
use base::{Doing, Fail, Result, Why};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::deb;

/// What helps where the cache cannot be.
pub const ELSEWHERE: &str = "set XDG_CACHE_HOME to a directory that can be written";

/// The directory for what mayfly can make again, whether it is there or not.
///
/// # Errors
/// The environment names none.
pub fn home() -> Result<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from);
    home_of(set("XDG_CACHE_HOME"), set("HOME")).ok_or_else(|| {
        Fail::new(Why::Missing, "find mayfly's cache")
            .because("neither XDG_CACHE_HOME nor HOME is set to an absolute path")
            .hint(ELSEWHERE)
    })
}

/// A relative path means nothing there (XDG Base Directory Specification): the cache would be another in each directory.
fn home_of(xdg: Option<PathBuf>, home: Option<PathBuf>) -> Option<PathBuf> {
    let tops = [xdg, home.map(|home| home.join(".cache"))];
    tops.into_iter().flatten().find(|top| top.is_absolute()).map(|top| top.join("mayfly"))
}

/// The kernels that are kept.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: PathBuf,
}

/// What is written down about a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct About {
    release: String,
    package: String,
    pulled: bool,
}

/// A kernel that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The name of its directory, which no other kernel has.
    pub name: String,
    /// As `uname -r` says it.
    pub release: String,
    /// The file name of the package that it came in.
    pub package: String,
    /// It was pulled, and did not just lie in a package that somebody named.
    pub pulled: bool,
    /// Where all of it is.
    pub dir: PathBuf,
}

impl Kept {
    /// The image.
    pub fn image(&self) -> PathBuf {
        self.dir.join(format!("boot/vmlinuz-{}", self.release))
    }
}

/// A package whose kernel is to be kept, with those that bring its modules.
pub struct Package {
    /// The one with the image.
    pub image: PathBuf,
    /// The others.
    pub modules: Vec<PathBuf>,
    /// It is being pulled.
    pub pulled: bool,
}

impl Cache {
    /// The cache of this user. Nothing is made or read.
    ///
    /// # Errors
    /// The environment says no place.
    pub fn find() -> Result<Cache> {
        home().map(|home| Cache::at(home.join("kernels")))
    }

    /// The cache in a directory.
    pub fn at(dir: PathBuf) -> Cache {
        Cache { dir }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All kernels, the newest release first.
    pub fn kernels(&self) -> Vec<Kept> {
        let entries = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut kept: Vec<Kept> =
            entries.filter_map(|entry| self.kept(&entry.file_name().into_string().ok()?)).collect();
        kept.sort_by_cached_key(|kept| (super::numbers(&kept.release), kept.name.clone()));
        kept.reverse();
        kept
    }

    /// The kernel with that name, or the one of that release; those that were pulled come first.
    pub fn named(&self, name: &str) -> Option<Kept> {
        let mut kernels = self.kernels();
        kernels.sort_by_key(|kept| !kept.pulled);
        let exact = kernels.iter().position(|kept| kept.name == name);
        let at = exact.or_else(|| kernels.iter().position(|kept| kept.release == name))?;
        kernels.into_iter().nth(at)
    }

    fn kept(&self, name: &str) -> Option<Kept> {
        let dir = self.dir.join(name);
        let about: About = serde_json::from_slice(&fs::read(dir.join("about.json")).ok()?).ok()?;
        // A release names a file below.
        (!about.release.contains('/')).then(|| Kept {
            name: name.to_owned(),
            release: about.release,
            package: about.package,
            pulled: about.pulled,
            dir,
        })
    }

    /// The kernel of the package at `path`: unpacked now, or found.
    ///
    /// # Errors
    /// The package cannot be read or is none, or the cache cannot be written.
    pub fn take(&self, path: &Path) -> Result<Kept> {
        self.keep(&Package { image: path.to_owned(), modules: deb::companions(path), pulled: false })
    }

    /// The kernel of a package: unpacked now, or found.
    ///
    /// # Errors
    /// As [`Cache::take`].
    pub fn keep(&self, package: &Package) -> Result<Kept> {
        let seen = self.dir.join("files").join(signs(package)?);
        let known = || self.kept(&fs::read_to_string(&seen).ok()?).filter(|kept| kept.image().is_file());
        if let Some(kept) = known().filter(|kept| kept.pulled || !package.pulled) {
            return Ok(kept);
        }
        let _lock = self.lock()?;
        // Whoever comes second has waited for the first.
        let kept = match known() {
            Some(kept) => kept,
            None => self.unpack(package)?,
        };
        let writing = || format!("fill the cache {}", self.dir.display());
        if package.pulled && !kept.pulled {
            self.write_about(&kept.dir, &About { pulled: true, ..about(&kept) })?;
        }
        // One that is being pulled is gone soon.
        if !package.pulled {
            fs::create_dir_all(self.dir.join("files")).doing(Why::Host, writing)?;
            put(&seen, kept.name.as_bytes()).doing(Why::Host, writing)?;
        }
        Ok(Kept { pulled: kept.pulled || package.pulled, ..kept })
    }

    /// Unpacks a package. The lock is held.
    fn unpack(&self, package: &Package) -> Result<Kept> {
        let digest = digest(package)?;
        let end = format!(".{}", digest.get(..12).unwrap_or(&digest));
        if let Some(kept) = self.kernels().into_iter().find(|kept| kept.name.ends_with(&end)) {
            return Ok(kept);
        }
        let scratch = self.scratch()?;
        let release = unpack(&package.image, &package.modules, &scratch);
        let kept = release.and_then(|release| {
            let package = package.image.file_name().unwrap_or_default().display().to_string();
            self.write_about(&scratch, &About { release: release.clone(), package, pulled: false })?;
            let name = format!("{release}{end}");
            let place = self.dir.join(&name);
            // One without its description is none, and in the way.
            remove(&place)?;
            fs::rename(&scratch, &place)
                .doing(Why::Host, || format!("fill the cache {}", place.display()))?;
            self.kept(&name).ok_or_else(|| Fail::new(Why::Host, format!("read back {}", place.display())))
        });
        if kept.is_err() {
            remove(&scratch)?;
        }
        kept
    }

    /// Calls `with` with an empty directory of the cache, which is gone afterwards.
    ///
    /// # Errors
    /// It cannot be made, or as `with` fails.
    pub fn with_scratch<T>(&self, with: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let (dir, _held) = self.fetching()?;
        let result = with(&dir);
        let removed = remove(&dir);
        result.and_then(|value| removed.map(|()| value))
    }

    /// Makes a directory for what is fetched, and the lock on it by which others see that its process lives.
    fn fetching(&self) -> Result<(PathBuf, File)> {
        // Nobody sees it before it is locked.
        let _lock = self.lock()?;
        self.clear_orphans();
        // A process that does not see this one may have its number.
        let made = (0..=u16::MAX).find_map(|n| {
            let dir = self.dir.join(format!("fetch-{}-{n}", std::process::id()));
            match fs::create_dir(&dir) {
                Err(cause) if cause.kind() == ErrorKind::AlreadyExists => None,
                made => Some(made.map(|()| dir)),
            }
        });
        let dir = made
            .unwrap_or_else(|| Err(ErrorKind::AlreadyExists.into()))
            .doing(Why::Host, || format!("make a directory in {}", self.dir.display()))?;
        let locking = || format!("lock {}", dir.display());
        let held = File::open(&dir).doing(Why::Host, locking)?;
        flock(&held, FlockOperation::NonBlockingLockExclusive).doing(Why::Host, locking)?;
        Ok((dir, held))
    }

    /// Removes what processes that were killed have left. The lock is held.
    fn clear_orphans(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let name = entry.file_name().into_string().unwrap_or_default();
            let free = |dir: &File| flock(dir, FlockOperation::NonBlockingLockExclusive).is_ok();
            if name.starts_with("fetch-") && File::open(entry.path()).is_ok_and(|dir| free(&dir)) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }

    /// Removes a kernel by its name, or all of a release.
    ///
    /// # Errors
    /// There is none, or it cannot be removed.
    pub fn remove(&self, name: &str) -> Result<Vec<Kept>> {
        let meant = |kept: &Kept| kept.name == name || kept.release == name;
        if !self.kernels().iter().any(meant) {
            let names: Vec<_> = self.kernels().into_iter().map(|kept| kept.release).collect();
            let fail =
                Fail::new(Why::Missing, format!("remove kernel {name}")).because("no such kernel is kept");
            return Err(match names.as_slice() {
                [] => fail.hint(format!("there is none in {}", self.dir.display())),
                names => fail.hint(format!("there are {}", names.join(", "))),
            });
        }
        let _lock = self.lock()?;
        let gone: Vec<_> = self.kernels().into_iter().filter(meant).collect();
        for kept in &gone {
            // First of all it is no kernel of ours any more, whatever becomes of its files.
            let about = kept.dir.join("about.json");
            fs::remove_file(&about).doing(Why::Denied, || format!("remove {}", about.display()))?;
            remove(&kept.dir)?;
        }
        for entry in fs::read_dir(self.dir.join("files")).into_iter().flatten().flatten() {
            if fs::read_to_string(entry.path()).is_ok_and(|name| gone.iter().any(|kept| kept.name == name)) {
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(gone)
    }

    fn making(&self) -> String {
        format!("make the cache {}", self.dir.display())
    }

    fn lock(&self) -> Result<File> {
        let open = || {
            fs::create_dir_all(&self.dir)?;
            File::create(self.dir.join("lock"))
        };
        let lock = open().doing(Why::Denied, || self.making()).map_err(|fail| fail.hint(ELSEWHERE))?;
        flock(&lock, FlockOperation::LockExclusive).doing(Why::Host, || self.making())?;
        Ok(lock)
    }

    /// An empty directory for one who holds the lock.
    fn scratch(&self) -> Result<PathBuf> {
        let dir = self.dir.join("new");
        remove(&dir)?;
        fs::create_dir(&dir).doing(Why::Host, || format!("make {}", dir.display()))?;
        Ok(dir)
    }

    fn write_about(&self, dir: &Path, about: &About) -> Result<()> {
        let text = serde_json::to_vec(about).doing(Why::Host, || "describe a kernel")?;
        put(&dir.join("about.json"), &text).doing(Why::Host, || format!("write into {}", dir.display()))
    }
}

fn about(kept: &Kept) -> About {
    About { release: kept.release.clone(), package: kept.package.clone(), pulled: kept.pulled }
}

/// Unpacks a kernel and its modules into the empty directory `into`; its release.
///
/// # Errors
/// A package is none, or has no kernel.
pub fn unpack(image: &Path, modules: &[PathBuf], into: &Path) -> Result<String> {
    let found = deb::unpack(image, into)?;
    let release = found.release.ok_or_else(|| {
        let fail = Fail::new(Why::Invalid, format!("find a kernel in {}", image.display()));
        match found.modules {
            true => fail
                .because("it has modules only")
                .hint("pass the package with the image, linux-image-VERSION.deb; this one is taken along if it lies beside"),
            false => fail.because("it holds no boot/vmlinuz-VERSION").hint("pass linux-image-VERSION.deb"),
        }
    })?;
    for path in modules {
        if let Some(other) = deb::unpack(path, into)?.release {
            return Err(Fail::new(Why::Invalid, format!("unpack {}", path.display()))
                .because(format!("it has a kernel of its own, {other}")));
        }
    }
    Ok(release)
}

/// Writes a file whole or not at all.
fn put(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let fresh = path.with_extension(format!("new-{}", std::process::id()));
    fs::write(&fresh, bytes)?;
    fs::rename(&fresh, path)
}

/// Removes a directory, if it is there.
pub fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(Fail::new(Why::Host, format!("remove {}", dir.display())).because(error))
        }
        _ => Ok(()),
    }
}

/// What tells one package from another without reading them: a digest of their places, lengths and times.
fn signs(package: &Package) -> Result<String> {
    let mut digest = Sha256::new();
    for path in [&package.image].into_iter().chain(&package.modules) {
        let opening = || format!("open package {}", path.display());
        let about = fs::metadata(path).map_err(|cause| unreadable(opening(), path, cause))?;
        if !about.is_file() {
            return Err(Fail::new(Why::Invalid, opening()).because("it is not a regular file"));
        }
        let path = std::path::absolute(path).doing(Why::Host, opening)?;
        digest.update(path.as_os_str().as_encoded_bytes());
        digest.update(about.size().to_le_bytes());
        for time in [about.mtime(), about.mtime_nsec(), about.ctime(), about.ctime_nsec()] {
            digest.update(time.to_le_bytes());
        }
    }
    Ok(hex(&digest.finalize()))
}

/// The digest of the content of a package, with those of its modules.
fn digest(package: &Package) -> Result<String> {
    let mut digest = Sha256::new();
    for path in [&package.image].into_iter().chain(&package.modules) {
        let reading = || format!("read package {}", path.display());
        let mut file = open_to_read(path).map_err(|cause| unreadable(reading(), path, cause))?;
        std::io::copy(&mut file, &mut Writer(&mut digest)).doing(Why::Host, reading)?;
    }
    Ok(hex(&digest.finalize()))
}

struct Writer<'a>(&'a mut Sha256);

impl std::io::Write for Writer<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

#[cfg(test)]
mod tests;
