//! The cache: images that have been unpacked, by their digest, in a directory of the user's.
//!
//! One unpacks at a time, under a lock; what is under way has a name of its own and is renamed when it is whole. So what has the
//! name of a digest is whole, and what a killed run has left goes with the next one.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, IsTerminal, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use base::{Doing, Fail, Result, Why};
use serde::{Deserialize, Serialize};

use super::config::Execution;
use super::decode;
use super::digest::{Digest, Digesting};
use super::ext4::Image;
use super::layer::{self, Store as _};
use super::source::{Recipe, Source, damaged};
use super::tree::{Kind, Meta, Tree};
use crate::{kernels, log, quote};

/// What images look like. One of another look is made anew.
const LOOK: u32 = 1;
/// Room that a guest finds on its root beside what is there. It takes none here until it is written to.
const FREE: u64 = 16 << 30;
/// What is under way, the lock, and what is known of files.
const NEW: &str = ".new";
const LOCK: &str = ".lock";
const SEEN: &str = ".seen";
/// The files of an image.
const ROOT: &str = "root.ext4";
const NOTE: &str = "image.json";
/// Names for the own machine: images often have an empty file, as who runs containers puts another in its place.
const HOSTS: &[u8] = b"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// The cache.
#[derive(Clone, Debug)]
pub struct Cache(PathBuf);

/// An image in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Its digest.
    pub id: Digest,
    /// What it is called.
    pub names: Vec<String>,
    /// How its program is run.
    pub execution: Execution,
}

/// What is written down of an image.
#[derive(Serialize, Deserialize)]
struct Note {
    look: u32,
    names: Vec<String>,
    execution: Execution,
}

/// What a file looks like: as long as that is the same, the file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    len: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// What is written down of a file that images come from.
#[derive(Serialize, Deserialize)]
struct Seen {
    #[serde(flatten)]
    look: Look,
    id: String,
}

impl Look {
    /// That of the file at a path.
    pub fn at(path: &Path) -> Option<Look> {
        let found = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
        Some(Look {
            len: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        })
    }

    /// Whether what was read of a file meanwhile is what it holds `now`, in seconds since 1970, when it looks like `after`. One
    /// that has just been written to may be written to again without its times telling it.
    pub fn is_settled(self, after: Option<Look>, now: u64) -> bool {
        let old = self.changed.0.saturating_add(2) < i64::try_from(now).unwrap_or(0);
        old && after == Some(self)
    }
}

impl Cache {
    /// The user's.
    ///
    /// # Errors
    /// Nobody says where it is.
    pub fn find() -> Result<Cache> {
        kernels::cache::home().map(|home| Cache(home.join("images")))
    }

    /// The one in a directory.
    pub fn at(dir: &Path) -> Cache {
        Cache(dir.to_owned())
    }

    fn place(&self, id: Digest) -> PathBuf {
        self.0.join(format!("sha256-{}", id.hex()))
    }

    /// The file with the root file system of an image.
    pub fn root(&self, id: Digest) -> PathBuf {
        self.place(id).join(ROOT)
    }

    fn fail(&self, cause: io::Error) -> Fail {
        let full = matches!(cause.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
        let hint = if full {
            "make room there (mayfly image list, mayfly image rm), or set XDG_CACHE_HOME to another place"
        } else {
            kernels::cache::ELSEWHERE
        };
        Fail::new(base::fail::why_of(&cause), format!("fill the cache {}", self.0.display()))
            .because(cause)
            .hint(hint)
    }

    /// An image, if it is there.
    pub fn get(&self, id: Digest) -> Option<Kept> {
        let text = fs::read(self.place(id).join(NOTE)).ok()?;
        let note: Note = serde_json::from_slice(&text).ok()?;
        let whole = note.look == LOOK && self.root(id).is_file();
        whole.then_some(Kept { id, names: note.names, execution: note.execution })
    }

    /// All images, the one that was used last first, with the time of that.
    pub fn all(&self) -> Vec<(Kept, SystemTime)> {
        let names = fs::read_dir(&self.0).into_iter().flatten().flatten().map(|entry| entry.file_name());
        let ids = names.filter_map(|name| Digest::from_hex(name.to_str()?.strip_prefix("sha256-")?));
        let time = |id| fs::metadata(self.place(id).join(NOTE)).and_then(|found| found.modified());
        let mut all: Vec<_> =
            ids.filter_map(|id| Some((self.get(id)?, time(id).unwrap_or(SystemTime::UNIX_EPOCH)))).collect();
        all.sort_by_key(|(kept, used)| (std::cmp::Reverse(*used), kept.id));
        all
    }

    /// Bytes that an image takes on the disk.
    pub fn size(&self, id: Digest) -> u64 {
        fs::metadata(self.root(id)).map_or(0, |found| found.blocks() * 512)
    }

    /// Whether a machine that this process sees runs on an image. Unlike [`Cache::is_used`] it takes no lock unless somebody
    /// else has one, which a machine that starts at this moment would take for another's.
    pub fn is_running(&self, id: Digest) -> bool {
        let Ok(found) = fs::metadata(self.root(id)) else { return false };
        // `1: FLOCK ADVISORY READ PID MAJOR:MINOR:INODE 0 EOF`, proc_locks(5). Some file systems say another device there.
        let (listed, inode) = (fs::read_to_string("/proc/locks"), format!(":{}", found.ino()));
        let is_listed = |locks: String| locks.split_ascii_whitespace().any(|word| word.ends_with(&inode));
        listed.map_or(true, is_listed) && self.is_used(id)
    }

    /// Whether a machine runs on an image.
    pub fn is_used(&self, id: Digest) -> bool {
        // Disks lock their images.
        let file = File::open(self.root(id));
        file.is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)))
    }

    /// Writes down that an image is used, and by what names.
    pub fn touch(&self, kept: &Kept) {
        let place = self.place(kept.id).join(NOTE);
        // Who may only read the cache can still use it.
        let _ = File::options().write(true).open(place).and_then(|file| file.set_modified(SystemTime::now()));
    }

    /// Takes the lock; what a killed run has left goes.
    fn lock(&self) -> Result<File> {
        let open = || {
            fs::create_dir_all(&self.0)?;
            File::create(self.0.join(LOCK))
        };
        let lock = open().map_err(|cause| self.fail(cause))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                log::note("waiting for another mayfly, which unpacks an image");
                lock.lock().map_err(|cause| self.fail(cause))?;
            }
            Err(TryLockError::Error(cause)) => return Err(self.fail(cause)),
        }
        self.clean()?;
        Ok(lock)
    }

    fn clean(&self) -> Result<()> {
        match fs::remove_dir_all(self.0.join(NEW)) {
            Err(cause) if cause.kind() != ErrorKind::NotFound => Err(self.fail(cause)),
            _ => Ok(()),
        }
    }

    /// Unpacks an image, unless it is there already.
    ///
    /// # Errors
    /// Its source cannot be read, or holds something else than it says; the cache cannot be written.
    pub fn fill(&self, source: &dyn Source, recipe: &Recipe, label: &str) -> Result<Kept> {
        let _lock = self.lock()?;
        let there = self.get(recipe.id).map(|kept| kept.names);
        let names = match there {
            Some(names) => names,
            None => {
                if io::stderr().is_terminal() {
                    log::note(&format!("unpacking image {label} (once)"));
                }
                let made = self.unpack(source, recipe, label);
                if made.is_err() {
                    // The first failure is the one to tell.
                    let _ = self.clean();
                }
                made?;
                Vec::new()
            }
        };
        self.name(recipe, names)
    }

    /// Gives an image, which is there, the names it has in its source; another that had one of them loses it.
    fn name(&self, recipe: &Recipe, names: Vec<String>) -> Result<Kept> {
        let new: Vec<_> = recipe.names.iter().filter(|name| !names.contains(name)).cloned().collect();
        for (other, _) in self.all() {
            if other.id != recipe.id && other.names.iter().any(|name| new.contains(name)) {
                let names = other.names.iter().filter(|name| !new.contains(name)).cloned().collect();
                self.note(&self.place(other.id), &Kept { names, ..other })?;
            }
        }
        let kept = Kept {
            id: recipe.id,
            names: names.into_iter().chain(new.iter().cloned()).collect(),
            execution: recipe.config.config.clone(),
        };
        if !new.is_empty() {
            self.note(&self.place(kept.id), &kept)?;
        }
        Ok(kept)
    }

    /// Writes down what is known of an image.
    fn note(&self, place: &Path, kept: &Kept) -> Result<()> {
        let Kept { names, execution, .. } = kept.clone();
        let text = serde_json::to_vec(&Note { look: LOOK, names, execution }).map_err(io::Error::other);
        let (new, old) = (place.join(".note"), place.join(NOTE));
        let written = text.and_then(|text| fs::write(&new, text)).and_then(|()| fs::rename(new, old));
        written.map_err(|cause| self.fail(cause))
    }

    fn unpack(&self, source: &dyn Source, recipe: &Recipe, label: &str) -> Result<()> {
        let new = self.0.join(NEW);
        let open = || {
            fs::create_dir(&new)?;
            File::options().write(true).create_new(true).open(new.join(ROOT))
        };
        let mut image = Image::new(open().map_err(|cause| self.fail(cause))?);
        let mut tree = Tree::default();
        for layer in &recipe.layers {
            let doing = || match layer.digest {
                Some(digest) => format!("unpack {digest} of image {label}"),
                None => format!("unpack {} of image {label}", quote::line(layer.place.as_bytes())),
            };
            let stream = source.open(layer)?;
            let mut packed = Digesting::new(stream);
            let applied = apply(&mut packed, layer.unpacked, recipe, &mut tree, &mut image);
            // What is wrong with the bytes says more than what came of it.
            packed.verify(layer.digest, layer.size).map_err(|cause| damaged(doing(), cause))?;
            applied.map_err(|cause| match cause.raw_os_error() {
                Some(_) => self.fail(cause),
                None => damaged(doing(), cause),
            })?;
        }
        let finish = || {
            furnish(&mut tree, &mut image, &recipe.config.config)?;
            image.finish(&tree, recipe.id.bytes(), FREE)
        };
        finish().map_err(|cause| match cause.raw_os_error() {
            Some(_) => self.fail(cause),
            None => damaged(format!("unpack image {label}"), cause),
        })?;
        let kept = Kept { id: recipe.id, names: Vec::new(), execution: recipe.config.config.clone() };
        self.note(&new, &kept)?;
        let place = self.place(recipe.id);
        // One of another look, or half removed.
        match fs::remove_dir_all(&place) {
            Err(cause) if cause.kind() != ErrorKind::NotFound => return Err(self.fail(cause)),
            _ => {}
        }
        fs::rename(&new, &place).map_err(|cause| self.fail(cause))
    }

    /// Removes an image. A machine that runs on it keeps its file.
    ///
    /// # Errors
    /// As the host answers.
    pub fn remove(&self, id: Digest) -> Result<()> {
        let _lock = self.lock()?;
        let doing = || format!("remove image {id}");
        // First out of sight, so that half of it is never seen.
        let new = self.0.join(NEW);
        fs::rename(self.place(id), &new).doing(Why::Host, doing)?;
        fs::remove_dir_all(new).doing(Why::Host, doing)
    }

    /// The image that came out of a file before, if the file is the same by all that the host tells of it.
    pub fn recall(&self, path: &Path, name: Option<&str>) -> Option<Kept> {
        let text = fs::read(self.0.join(SEEN).join(key(path, name))).ok()?;
        let seen: Seen = serde_json::from_slice(&text).ok()?;
        let id: Digest = seen.id.parse().ok()?;
        (Look::at(path)? == seen.look).then(|| self.get(id))?
    }

    /// Writes down which image came out of a file, if it still looks as it did before it was read.
    pub fn remember(&self, path: &Path, name: Option<&str>, look: Look, id: Digest) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        if !look.is_settled(Look::at(path), now.as_secs()) {
            return;
        }
        let seen = Seen { look, id: id.to_string() };
        let dir = self.0.join(SEEN);
        // It only saves time.
        let _ = fs::create_dir_all(&dir)
            .and_then(|()| serde_json::to_vec(&seen).map_err(io::Error::other))
            .and_then(|text| fs::write(dir.join(key(path, name)), text));
    }
}

/// Applies a layer, whose unpacked bytes have a digest as well.
fn apply(
    packed: &mut impl Read,
    promised: Option<Digest>,
    recipe: &Recipe,
    tree: &mut Tree,
    image: &mut Image,
) -> io::Result<()> {
    let (_, stream) = decode::open(packed)?;
    match promised {
        None => layer::apply(stream, recipe.form, tree, image),
        Some(_) => {
            let mut unpacked = Digesting::new(stream);
            layer::apply(&mut unpacked, recipe.form, tree, image)?;
            unpacked.verify(promised, None)
        }
    }
}

/// Adds what a root needs to be run, where it is missing: the directory of the program, and the machine's own names.
fn furnish(tree: &mut Tree, image: &mut Image, execution: &Execution) -> io::Result<()> {
    tree.begin_layer();
    if execution.working_dir.starts_with('/') {
        tree.furnish(execution.working_dir.as_bytes())?;
    }
    let place = b"/etc/hosts";
    let empty = match tree.find(place)? {
        None => true,
        Some(id) => matches!(&tree.node(id).kind, Kind::File(content) if content.len == 0),
    };
    if empty {
        let content = image.put(&mut &*HOSTS, HOSTS.len() as u64)?;
        tree.put(place, Kind::File(content), Meta { mode: 0o644, ..Meta::default() })?;
    }
    Ok(())
}

fn key(path: &Path, name: Option<&str>) -> String {
    let text = [path.as_os_str().as_encoded_bytes(), b"\0", name.unwrap_or_default().as_bytes()].concat();
    Digest::of(&text).hex()
}
