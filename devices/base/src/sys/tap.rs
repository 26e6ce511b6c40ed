//! Tap interfaces of the host: a network card whose other side is a descriptor that takes and gives frames.

use std::ffi::c_int;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{AddressFamily, SocketType, socket};

/// Offloads that the kernel may leave to the reader of a tap, and the bits of `TUNSETOFFLOAD` for them.
pub mod offload {
    /// Checksums that are not computed yet.
    pub const CSUM: u32 = libc::TUN_F_CSUM;
    /// TCP over IPv4 in large segments.
    pub const TSO4: u32 = libc::TUN_F_TSO4;
    /// TCP over IPv6 in large segments.
    pub const TSO6: u32 = libc::TUN_F_TSO6;
    /// Such segments with a congestion mark.
    pub const ECN: u32 = libc::TUN_F_TSO_ECN;
    /// UDP datagrams larger than a packet.
    pub const UFO: u32 = libc::TUN_F_UFO;
    /// Several UDP datagrams in one packet (both IP versions; since Linux 6.2).
    pub const USO: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;
}

/// Bytes of the header before each frame: `struct virtio_net_hdr_v1`.
const HEADER: c_int = 12;

/// An open tap interface.
#[derive(Debug)]
pub struct Tap {
    /// Its name.
    pub name: String,
    /// One descriptor for each queue, non-blocking; each read or write is one frame behind its virtio header.
    pub queues: Vec<OwnedFd>,
    /// Its MTU in bytes.
    pub mtu: u16,
    /// The offloads that this kernel knows.
    pub offloads: u32,
}

type Request = libc::ifreq;

fn request(name: &str) -> io::Result<Request> {
    // SAFETY: the structure is plain data for which zeros are a value.
    let mut request: Request = unsafe { zeroed() };
    // The last byte stays zero.
    let room = request.ifr_name.len() - 1;
    if name.is_empty()
        || name.len() > room
        || name.contains(['/', '\0'])
        || name.contains(char::is_whitespace)
    {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no name of an interface"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    Ok(request)
}

fn checked(answer: c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether an interface can have this name: 1 to 15 bytes without slash and space.
pub fn is_name(name: &str) -> bool {
    request(name).is_ok()
}

impl Tap {
    /// Opens the tap called `name` with so many queues. If there is none, one is made that lives as long as its
    /// descriptors; `%d` in the name stands for a number of the kernel's choice.
    ///
    /// # Errors
    /// There is no tun driver, no permission, or the interface is in use or no tap.
    pub fn open(name: &str, queues: usize) -> io::Result<Tap> {
        let plain = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let multi = plain | libc::IFF_MULTI_QUEUE;
        let first = match attach(name, if queues > 1 { multi } else { plain }) {
            // One that was made for several queues takes no other kind of user.
            Err(cause) if queues == 1 && cause.raw_os_error() == Some(libc::EINVAL) => attach(name, multi),
            result => result,
        }?;
        let (file, name) = first;
        let mut files = vec![file];
        while files.len() < queues {
            files.push(attach(&name, multi)?.0);
        }
        let first = files.first().ok_or(io::ErrorKind::InvalidInput)?;
        let all = offload::CSUM | offload::TSO4 | offload::TSO6 | offload::ECN;
        let known = [all | offload::UFO | offload::USO, all | offload::USO, all | offload::UFO, all, 0];
        let offloads = known.into_iter().find(|set| set_offloads(first, *set).is_ok()).unwrap_or(0);
        // Nothing is asked for until a driver says what it takes.
        set_offloads(first, 0)?;
        let mtu = mtu(&name).unwrap_or(1500);
        let queues = files.into_iter().map(OwnedFd::from).collect();
        Ok(Tap { name, queues, mtu, offloads })
    }

    /// Brings the interface up. Needs the right to administer the network.
    ///
    /// # Errors
    /// As the kernel answers.
    pub fn bring_up(&self) -> io::Result<()> {
        let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
        let mut request = request(&self.name)?;
        // SAFETY: the request is alive during the call, which fills in its flags.
        checked(unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request) })?;
        // SAFETY: the call before has filled in this field.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let up = libc::c_short::try_from(libc::IFF_UP).map_err(io::Error::other)?;
        request.ifr_ifru.ifru_flags = flags | up;
        // SAFETY: as above; this one only reads the request.
        checked(unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCSIFFLAGS, &request) })
    }

    /// Says what the reader of the frames takes: bits of [`offload`].
    ///
    /// # Errors
    /// The kernel does not know one.
    pub fn set_offloads(&self, set: u32) -> io::Result<()> {
        self.queues.first().map_or(Ok(()), |queue| set_offloads(queue, set))
    }

    /// Has the kernel use the first `count` queues only.
    ///
    /// # Errors
    /// It is not open with several queues.
    pub fn use_queues(&self, count: usize) -> io::Result<()> {
        for (at, queue) in self.queues.iter().enumerate().skip(1) {
            let flag = if at < count { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
            // SAFETY: the structure is plain data for which zeros are a value.
            let mut request: Request = unsafe { zeroed() };
            request.ifr_ifru.ifru_flags = libc::c_short::try_from(flag).map_err(io::Error::other)?;
            // SAFETY: the request is alive during the call, which only reads it.
            let answer = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, &request) };
            match checked(answer) {
                // It is as wanted already.
                Err(cause) if cause.raw_os_error() == Some(libc::EINVAL) => {}
                result => result?,
            }
        }
        Ok(())
    }
}

/// One more queue of the interface: its descriptor, and the name of the interface.
fn attach(name: &str, flags: c_int) -> io::Result<(File, String)> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    let fd = file.as_raw_fd();
    // SAFETY: the request is alive during the call, which reads its name and flags and writes the name.
    checked(unsafe { libc::ioctl(fd, libc::TUNSETIFF, &mut request) })?;
    // SAFETY: the number is alive during the call, which reads it.
    checked(unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &HEADER) })?;
    let given = request.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned());
    Ok((file, String::from_utf8_lossy(&given.collect::<Vec<u8>>()).into_owned()))
}

fn set_offloads(queue: impl AsFd, set: u32) -> io::Result<()> {
    let fd = queue.as_fd().as_raw_fd();
    // SAFETY: the request takes a number and touches no memory.
    checked(unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD, libc::c_ulong::from(set)) })
}

fn mtu(name: &str) -> io::Result<u16> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let mut request = request(name)?;
    // SAFETY: the request is alive during the call, which fills in the MTU.
    checked(unsafe { libc::ioctl(any.as_raw_fd(), libc::SIOCGIFMTU, &mut request) })?;
    // SAFETY: the call has filled in this field.
    u16::try_from(unsafe { request.ifr_ifru.ifru_mtu }).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "a b", "a/b", "0123456789abcdef", "a\0"] {
            assert!(request(name).is_err(), "{name:?}");
        }
        assert!(request("mayfly%d").is_ok());
    }
}
