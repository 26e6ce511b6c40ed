//! Where the doctor looks: this host, or a tree of files and answers that a test made.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base::{Fail, Result};
use rustix::process::{Resource, getrlimit};

use crate::accel::{self, Ring0};
use crate::hv::kvm::Hypervisor;
use crate::lab;

/// A limit of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Number of open files.
    OpenFiles,
    /// Bytes of locked memory.
    LockedMemory,
}

/// What a KVM that opens is like.
#[derive(Debug)]
pub struct Kvm {
    /// Required capabilities that it lacks: name and purpose.
    pub lacks: Vec<(&'static str, &'static str)>,
    /// How it runs guest kernels.
    pub ring0: Result<Ring0>,
}

/// A host to look at.
pub trait Site {
    /// Where its root directory is.
    fn root(&self) -> &Path;

    /// Opens /dev/kvm and asks it.
    ///
    /// # Errors
    /// It is missing, may not be opened, or is no KVM.
    fn kvm(&self) -> Result<Kvm>;

    /// Sets up a small io_uring.
    ///
    /// # Errors
    /// As the host answers.
    fn io_uring(&self) -> io::Result<()>;

    /// The limit in force; `None` is no limit.
    fn limit(&self, which: Limit) -> Option<u64>;

    /// What the emulated host needs and this one lacks.
    fn emulated_host_lacks(&self) -> Vec<Fail>;

    /// The directory in which the kernel of the emulated host is or can be kept.
    ///
    /// # Errors
    /// It cannot be kept there.
    fn cache(&self) -> Result<PathBuf>;

    /// A path of the host.
    fn path(&self, path: &str) -> PathBuf {
        self.root().join(path)
    }

    /// The text of a small file; `None` if it cannot be read.
    fn read(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.path(path)).ok()
    }

    /// Opens a device for reading and writing.
    ///
    /// # Errors
    /// As the host answers.
    fn opens(&self, path: &str) -> io::Result<()> {
        OpenOptions::new().read(true).write(true).open(self.path(path)).map(|_| ())
    }
}

/// The host that this process runs on; files are looked up below a root.
pub struct ThisHost {
    root: PathBuf,
}

impl Default for ThisHost {
    fn default() -> Self {
        ThisHost { root: "/".into() }
    }
}

impl ThisHost {
    /// This host, with its files below `root`.
    pub fn below(root: &Path) -> Self {
        ThisHost { root: root.to_owned() }
    }
}

impl Site for ThisHost {
    fn root(&self) -> &Path {
        &self.root
    }

    fn kvm(&self) -> Result<Kvm> {
        let hypervisor = Arc::new(Hypervisor::open(&self.path("dev/kvm"))?);
        let lacks = hypervisor.lacks();
        Ok(Kvm { lacks, ring0: accel::ring0(&hypervisor) })
    }

    fn io_uring(&self) -> io::Result<()> {
        io_uring::IoUring::new(2).map(|_| ())
    }

    fn limit(&self, which: Limit) -> Option<u64> {
        let resource = match which {
            Limit::OpenFiles => Resource::Nofile,
            Limit::LockedMemory => Resource::Memlock,
        };
        getrlimit(resource).current
    }

    fn emulated_host_lacks(&self) -> Vec<Fail> {
        lab::lacks()
    }

    fn cache(&self) -> Result<PathBuf> {
        lab::cache()
    }
}
