//! What stands behind a disk, opened: clones share it.

use std::fs::File;
use std::io;
use std::sync::Arc;

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

impl Image {
    /// The bytes of `file`, a file or a block device, are those of the disk.
    pub fn raw(file: File) -> Image {
        Image(Kind::Flat(Arc::new(Layers::one(file))))
    }

    /// The same, with `file` opened past the page cache (`O_DIRECT`).
    ///
    /// # Errors
    /// The host reads it in no block of up to 4096 bytes.
    pub fn direct(file: File) -> io::Result<Image> {
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
