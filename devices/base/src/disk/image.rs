//! What stands behind a disk, opened: clones share it.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use super::Layers;
use super::qcow2::Qcow2;

/// An open image.
#[derive(Clone)]
pub struct Image(pub(super) Kind);

#[derive(Clone)]
pub(super) enum Kind {
    Flat(Arc<Layers>),
    Qcow2(Arc<Qcow2>),
}

/// Makes reads and writes of `file` go past the host's page cache.
///
/// # Errors
/// Its file system does not do that.
pub fn go_direct(file: &File) -> io::Result<()> {
    let flags = fcntl_getfl(file)?;
    Ok(fcntl_setfl(file, flags | OFlags::DIRECT)?)
}

impl Image {
    /// The bytes of `file`, a file or a block device, are those of the disk.
    pub fn raw(file: File) -> Image {
        Image(Kind::Flat(Arc::new(Layers::one(file))))
    }

    /// The same past the host's page cache (`O_DIRECT`, which is set on `file` and all that share it).
    ///
    /// # Errors
    /// Its file system does not do that, or reads it in no block of up to 4096 bytes.
    pub fn direct(file: File) -> io::Result<Image> {
        go_direct(&file)?;
        Ok(Image(Kind::Flat(Arc::new(Layers::direct(file)?))))
    }

    /// The disk begins as `base`, which is only read. What is written goes to `top`, an empty file, and is as good as
    /// gone when the disk is closed: nothing tells which sectors were written.
    ///
    /// # Errors
    /// The host refuses to make `top` as long as `base`.
    pub fn throwaway(base: File, top: File) -> io::Result<Image> {
        Ok(Image(Kind::Flat(Arc::new(Layers::over(base, top)?))))
    }

    /// The size of the disk now, in bytes.
    ///
    /// # Errors
    /// As the host answers.
    pub fn size(&self) -> io::Result<u64> {
        match &self.0 {
            Kind::Flat(layers) => layers.size(),
            Kind::Qcow2(image) => Ok(image.size()),
        }
    }

    /// Makes the file of a raw image longer, to `bytes`; the disk with it.
    ///
    /// # Errors
    /// `InvalidInput`: it has no such file, or is larger; or as the host answers.
    pub fn grow(&self, bytes: u64) -> io::Result<()> {
        match &self.0 {
            Kind::Flat(layers) => layers.grow(bytes),
            Kind::Qcow2(_) => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a qcow2 image does not grow while it is used",
            )),
        }
    }

    /// Bytes of the smallest block that can be read and written; other ranges are refused by the host.
    pub fn block(&self) -> u64 {
        match &self.0 {
            Kind::Flat(layers) => layers.block(),
            Kind::Qcow2(_) => 512,
        }
    }

    /// Bytes in which the image gives up space.
    pub fn grain(&self) -> u64 {
        match &self.0 {
            Kind::Flat(layers) => layers.block().max(4096),
            Kind::Qcow2(image) => image.cluster(),
        }
    }

    /// Whether io_uring can serve it.
    pub fn flat(&self) -> bool {
        matches!(self.0, Kind::Flat(_))
    }
}
