//! Disks in qcow2 images, through `imago`. Its calls wait, so they belong on threads.
//!
//! Nothing is guessed and nothing is opened here: the caller looks at what an image names, opens that if it may, and
//! hands it in.

mod check;

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use imago::file::File as Storage;
use imago::{FormatAccess, FormatCreateBuilder};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::image::{Image, Kind};
use super::{Action, Job};

/// The first bytes of every qcow2 image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes that go through one copy: guest RAM is shared with the guest, and what `imago` is given must not be. More would
/// leave the processor's cache before they are copied on.
const COPY: usize = 256 << 10;

type Access = FormatAccess<Storage>;
type Format = imago::qcow2::Qcow2<Storage, Arc<Access>>;

/// An image of which it is not yet known what it stands on.
pub struct Opening {
    format: Format,
    writable: bool,
    cluster: u64,
}

/// What an image stands on: only read.
pub struct Backing(Arc<Access>);

impl Backing {
    /// A raw file.
    ///
    /// # Errors
    /// As the host answers.
    pub fn raw(file: File) -> io::Result<Backing> {
        let raw = imago::raw::Raw::open_image(Storage::try_from(file)?, false)?;
        Ok(Backing(Arc::new(FormatAccess::new(raw))))
    }

    /// The size of the disk in it, in bytes.
    pub fn size(&self) -> u64 {
        self.0.size()
    }
}

/// Formats `file`, which is empty, as a disk of `size` bytes over `backing` (name and format).
///
/// # Errors
/// As the host answers.
pub fn create(file: File, size: u64, backing: Option<(String, &str)>) -> io::Result<()> {
    let mut builder = Format::create_builder(Storage::try_from(file)?).size(size);
    if let Some((name, format)) = backing {
        builder = builder.backing(name, format.to_owned());
    }
    builder.create()
}

/// Does `look` with `O_DIRECT` off: what is looked at begins and ends at no block of the host.
fn through_the_cache<R>(file: &File, look: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
    let flags = fcntl_getfl(file)?;
    if !flags.contains(OFlags::DIRECT) {
        return look();
    }
    fcntl_setfl(file, flags - OFlags::DIRECT)?;
    let found = look();
    fcntl_setfl(file, flags)?;
    found
}

impl Opening {
    /// Reads the head of a qcow2 image.
    ///
    /// # Errors
    /// It is none, it is damaged, or it needs what we do not know.
    pub fn new(file: File, writable: bool) -> io::Result<Opening> {
        let bits = through_the_cache(&file, || {
            use std::os::unix::fs::FileExt;
            let mut bits = [0; 4];
            file.read_exact_at(&mut bits, 20)?;
            if writable {
                check::check(&file)?;
            }
            Ok(bits)
        })?;
        let format = Format::open_image(Storage::try_from(file)?, writable)?;
        // `open_image` has seen to it that it is between 9 and 21.
        let cluster = 1u64.checked_shl(u32::from_be_bytes(bits)).unwrap_or(1 << 16);
        Ok(Opening { format, writable, cluster })
    }

    /// The file that it stands on and its format, as the image says.
    pub fn backing(&self) -> Option<(&str, Option<&str>)> {
        let name = self.format.implicit_backing_file()?;
        Some((name, self.format.implicit_backing_format().map(String::as_str)))
    }

    /// The size of the disk in it, in bytes.
    pub fn size(&self) -> u64 {
        use imago::format::drivers::FormatDriverInstance;
        self.format.size()
    }

    /// Whether its data are in another file.
    pub fn has_data_file(&self) -> bool {
        self.format.requires_external_data_file()
    }

    fn over(mut self, backing: Option<Backing>) -> Access {
        self.format.set_data_file(None);
        self.format.set_backing(backing.map(|backing| backing.0));
        FormatAccess::new(self.format)
    }

    /// For an image above this one, which itself stands on `backing`.
    pub fn below(self, backing: Option<Backing>) -> Backing {
        Backing(Arc::new(self.over(backing)))
    }

    /// The disk in it, on `backing`.
    pub fn image(self, backing: Option<Backing>) -> Image {
        let (writable, cluster) = (self.writable, self.cluster);
        let access = RwLock::new(self.over(backing));
        Image(Kind::Qcow2(Arc::new(Qcow2 { access, writable, cluster, copies: Mutex::default() })))
    }
}

/// A disk in a qcow2 image.
pub struct Qcow2 {
    /// Taken for writing by what gives up clusters: nobody else may be using them then.
    access: RwLock<Access>,
    writable: bool,
    cluster: u64,
    /// Room for copies, one for each thread that ever worked at the same time: fresh memory would be cleared, and
    /// faulted in, for each request.
    copies: Mutex<Vec<Vec<u8>>>,
}

impl Qcow2 {
    pub fn size(&self) -> u64 {
        self.access.read().unwrap_or_else(PoisonError::into_inner).size()
    }

    pub fn cluster(&self) -> u64 {
        self.cluster
    }

    /// Does a job in this thread.
    pub fn run(&self, job: Job) -> io::Result<()> {
        let range = (job.offset, job.len);
        match job.action {
            Action::Read => self.read(job),
            Action::Write => self.write(job),
            Action::Flush => self.flush(),
            Action::Discard => match self.exclusive(|access| access.discard_to_any(range.0, range.1)) {
                // Images of version 2 have no way to say so, and a discard is advice.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
                answer => answer,
            },
            Action::Zero { unmap } => {
                let zeroed = if unmap {
                    self.exclusive(|access| access.discard_to_zero(range.0, range.1))
                } else {
                    self.shared(|access| access.write_zeroes(range.0, range.1))
                };
                match zeroed {
                    Err(error) if error.kind() == io::ErrorKind::Unsupported => self.fill(range),
                    answer => answer,
                }
            }
        }
    }

    fn shared<R>(&self, f: impl FnOnce(&Access) -> R) -> R {
        f(&self.access.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn exclusive<R>(&self, f: impl FnOnce(&mut Access) -> R) -> R {
        f(&mut self.access.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// Calls `step` with room for the next bytes and where they are, until `len` bytes from `offset` have been through.
    fn copied(
        &self,
        mut offset: u64,
        mut len: u64,
        mut step: impl FnMut(&Access, &mut [u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let spare = || self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = spare().pop().unwrap_or_else(|| vec![0; COPY]);
        let mut end = Ok(());
        while let (Ok(()), Some(part)) = (&end, part(&mut bytes, len)) {
            end = self.shared(|access| step(access, part, offset));
            offset = offset.saturating_add(part.len() as u64);
            len = len.saturating_sub(part.len() as u64);
        }
        spare().push(bytes);
        end
    }

    fn read(&self, mut job: Job) -> io::Result<()> {
        let (offset, len) = (job.offset, job.len);
        self.copied(offset, len, |access, part, offset| {
            access.read(&mut *part, offset)?;
            job.iovecs.copy_in(part);
            job.moved(part.len() as u64);
            Ok(())
        })
    }

    fn write(&self, mut job: Job) -> io::Result<()> {
        let (offset, len) = (job.offset, job.len);
        self.copied(offset, len, |access, part, offset| {
            job.iovecs.copy_out(part);
            access.write(&*part, offset)?;
            job.moved(part.len() as u64);
            Ok(())
        })
    }

    /// Writes zeros, where the image can say it in no shorter way.
    fn fill(&self, (offset, len): (u64, u64)) -> io::Result<()> {
        self.copied(offset, len, |access, part, offset| {
            part.fill(0);
            access.write(&*part, offset)
        })
    }

    /// Hands what is kept in memory to the host, without waiting for its disk.
    pub fn settle(&self) -> io::Result<()> {
        if self.writable { self.shared(|access| access.flush()) } else { Ok(()) }
    }

    fn flush(&self) -> io::Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.shared(|access| {
            access.flush()?;
            access.sync()
        })
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        // Nobody is left to be answered. A guest that resets its machine on a full host disk has it told in each life.
        if let Err(cause) = self.settle() {
            log::error!(target: "guest", "write the tables of a qcow2 image: {cause}");
        }
    }
}

/// As much of `bytes` as `len` needs; `None` when that is nothing.
fn part(bytes: &mut [u8], len: u64) -> Option<&mut [u8]> {
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(bytes.len());
    bytes.get_mut(..len).filter(|part| !part.is_empty())
}
