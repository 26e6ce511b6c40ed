//! Vhost by its ioctls. The kernel is told host addresses of guest memory and of nothing else.

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::ioctl::{Opcode, opcode};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::host::vhost::{Back, Place, Request, Vhost};
use crate::memory::Memory;

/// The group of all these calls.
const VIRTIO: u8 = 0xaf;
const GET_FEATURES: Opcode = opcode::read::<u64>(VIRTIO, 0x00);
const SET_FEATURES: Opcode = opcode::write::<u64>(VIRTIO, 0x00);
const SET_OWNER: Opcode = opcode::none(VIRTIO, 0x01);
/// Its size is that of the head; the regions follow.
const SET_MEM_TABLE: Opcode = opcode::write::<[u32; 2]>(VIRTIO, 0x03);
const SET_VRING_NUM: Opcode = opcode::write::<State>(VIRTIO, 0x10);
const SET_VRING_ADDR: Opcode = opcode::write::<Addresses>(VIRTIO, 0x11);
const SET_VRING_BASE: Opcode = opcode::write::<State>(VIRTIO, 0x12);
const SET_VRING_KICK: Opcode = opcode::write::<Descriptor>(VIRTIO, 0x20);
const SET_VRING_CALL: Opcode = opcode::write::<Descriptor>(VIRTIO, 0x21);
const SET_VRING_ERR: Opcode = opcode::write::<Descriptor>(VIRTIO, 0x22);
const NET_SET_BACKEND: Opcode = opcode::write::<Descriptor>(VIRTIO, 0x30);
const VSOCK_SET_GUEST_CID: Opcode = opcode::write::<u64>(VIRTIO, 0x60);
const VSOCK_SET_RUNNING: Opcode = opcode::write::<c_int>(VIRTIO, 0x61);

/// `struct vhost_vring_state`.
#[repr(C)]
struct State {
    index: u32,
    num: u32,
}

/// `struct vhost_vring_file`; -1 is no descriptor.
#[repr(C)]
struct Descriptor {
    index: u32,
    fd: c_int,
}

/// `struct vhost_vring_addr`: host addresses.
#[repr(C)]
struct Addresses {
    index: u32,
    flags: u32,
    desc: u64,
    used: u64,
    avail: u64,
    log: u64,
}

/// An open vhost device of the host's kernel.
#[derive(Debug)]
pub struct Kernel {
    file: File,
    back: Back,
    /// What the kernel was told the addresses of. Last: it goes after the descriptor, with which the kernel lets go.
    memory: Memory,
}

impl Kernel {
    /// Opens the one of that kind, for a guest with this memory.
    ///
    /// # Errors
    /// As the host answers.
    pub fn open(back: Back, memory: &Memory) -> io::Result<Kernel> {
        Ok(Kernel { file: open(back)?, back, memory: memory.clone() })
    }

    /// # Safety
    /// The call of that code reads or writes one `T` at most, and addresses in it are such that the kernel may use them.
    unsafe fn call<T>(&self, code: Opcode, argument: *mut T) -> io::Result<()> {
        // SAFETY: the caller's word; the descriptor is open.
        let answer = unsafe { libc::ioctl(self.file.as_raw_fd(), code.into(), argument) };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    fn set<T>(&self, code: Opcode, mut value: T) -> io::Result<()>
    where
        T: Harmless,
    {
        // SAFETY: each code of this file is made of the type that it reads, and harmless ones have no address.
        unsafe { self.call(code, &raw mut value) }
    }

    fn own(&self) -> io::Result<()> {
        // SAFETY: the call takes no argument.
        unsafe { self.call(SET_OWNER, std::ptr::null_mut::<u8>()) }?;
        // `struct vhost_memory`: the number of regions, then four numbers for each.
        let mut table = vec![0];
        for piece in self.memory.pieces() {
            table.extend([piece.guest, piece.len, piece.host, 0]);
            table[0] += 1u64;
        }
        // SAFETY: the call reads the head and as many regions as it says. They are the mappings of guest RAM, which
        // stay reserved for as long as this value lives; only volatile access is made to them here.
        unsafe { self.call(SET_MEM_TABLE, table.as_mut_ptr()) }
    }

    /// The host address of `len` bytes of guest memory, all of one piece.
    fn host(&self, guest: u64, len: u64) -> io::Result<u64> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let slice = self.memory.ram().get_slice(GuestAddress(guest), len);
        let slice = slice.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(slice.ptr_guard().as_ptr() as u64)
    }

    fn place(&self, index: u32, place: Place) -> io::Result<()> {
        let size = u64::from(place.size);
        let mut addresses = Addresses {
            index,
            flags: 0,
            // Virtio 1.2, section 2.7, with the event field behind each ring.
            desc: self.host(place.desc, size * 16)?,
            used: self.host(place.used, 6 + size * 8)?,
            avail: self.host(place.avail, 6 + size * 2)?,
            log: 0,
        };
        // Of one entry, until the addresses are those of this ring: an error between leaves none that is too long.
        self.set(SET_VRING_NUM, State { index, num: 1 })?;
        // SAFETY: the addresses are those of guest RAM, with room for a ring of this size; as for the memory table.
        unsafe { self.call(SET_VRING_ADDR, &raw mut addresses) }?;
        self.set(SET_VRING_NUM, State { index, num: place.size.into() })?;
        self.set(SET_VRING_BASE, State { index, num: 0 })
    }
}

/// What has no address in it.
trait Harmless {}
impl Harmless for u64 {}
impl Harmless for c_int {}
impl Harmless for State {}
impl Harmless for Descriptor {}

fn open(back: Back) -> io::Result<File> {
    File::options().read(true).write(true).open(back.path())
}

impl Vhost for Kernel {
    fn ask(&mut self, request: Request<'_>) -> io::Result<u64> {
        let file =
            |index, fd: Option<BorrowedFd<'_>>| Descriptor { index, fd: fd.map_or(-1, |fd| fd.as_raw_fd()) };
        match request {
            Request::Features => {
                let mut features = 0u64;
                // SAFETY: the call writes one number, which is alive.
                unsafe { self.call(GET_FEATURES, &raw mut features) }?;
                return Ok(features);
            }
            Request::Own => self.own(),
            Request::Accept(features) => self.set(SET_FEATURES, features),
            Request::Ring(index, place) => self.place(index, place),
            Request::Kick(index, fd) => self.set(SET_VRING_KICK, file(index, fd)),
            Request::Call(index, fd) => self.set(SET_VRING_CALL, file(index, fd)),
            Request::Error(index, fd) => self.set(SET_VRING_ERR, file(index, fd)),
            Request::Backend(index, fd) => self.set(NET_SET_BACKEND, file(index, fd)),
            Request::Guest(cid) => self.set(VSOCK_SET_GUEST_CID, u64::from(cid)),
            Request::Run(run) => self.set(VSOCK_SET_RUNNING, c_int::from(run)),
        }
        .map(|()| 0)
    }

    fn renew(&mut self) -> io::Result<()> {
        // The old one goes first: two of them cannot have one context ID.
        self.file = File::open("/dev/null")?;
        self.file = open(self.back)?;
        Ok(())
    }
}
