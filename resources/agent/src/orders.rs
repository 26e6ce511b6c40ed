//! Orders: what an initial RAM disk tells the agent in it to be a guest for commands, in a file beside it.
//!
//! They are a file, and no words of the kernel command line: those have an end at 2048 bytes and no spaces, and paths
//! have both.

use std::net::IpAddr;

use crate::wire::{Body, Malformed, put_number, put_string};

/// Where the file is.
pub const PATH: &str = "/mayfly.orders";

/// Where the layer of a private root is found, if it was ordered. `/run/mayfly` itself belongs to a mayfly that runs in the guest.
pub const CHANGES: &str = "/run/mayfly-guest/changes";

/// A file system that a disk may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystem {
    /// Its name, which is that of its module, too.
    pub name: &'static str,
    /// The option of the kernel's configuration that makes it a module, without the `CONFIG_`. `None`: it is used where the
    /// kernel has it built in, and its module is not worth its time.
    pub option: Option<&'static str>,
}

/// What a disk may have, in the order in which the agent tries them.
pub const ON_DISKS: [FileSystem; 5] = [
    FileSystem { name: "ext4", option: Some("EXT4_FS") },
    FileSystem { name: "xfs", option: Some("XFS_FS") },
    FileSystem { name: "erofs", option: Some("EROFS_FS") },
    FileSystem { name: "squashfs", option: Some("SQUASHFS") },
    // Its module brings that of RAID 6, which measures its own algorithms at each start.
    FileSystem { name: "btrfs", option: None },
];

/// All that the agent has to know before it can be asked for programs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// The host's port at which the wire is answered.
    pub port: u32,
    /// The name of the machine.
    pub hostname: Vec<u8>,
    /// The root file system; the RAM disk itself without one.
    pub root: Option<Volume>,
    /// What else is to be mounted beneath the root, in this order.
    pub volumes: Vec<Volume>,
    /// The systemd of the root is process 1, and the agent one of its services.
    pub systemd: bool,
    /// What is written to a private root is to be found at [`CHANGES`].
    pub changes: bool,
    /// Network interfaces that are set up before the first program.
    pub interfaces: Vec<Interface>,
}

/// A network interface to be set up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its Ethernet address; without one it is the first card whose address is in no other order.
    pub mac: Option<[u8; 6]>,
    /// Its addresses, each with the length of its network's prefix.
    pub addresses: Vec<(IpAddr, u8)>,
    /// The ways to everywhere else.
    pub gateways: Vec<IpAddr>,
    /// Servers that know names.
    pub servers: Vec<IpAddr>,
}

/// A file system to be mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Where it comes from.
    pub source: Source,
    /// Its place in the guest: a directory, made if it is missing.
    pub place: Vec<u8>,
    /// Who sees what is written there.
    pub writes: Writes,
}

/// Where a file system comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory of the host, by the tag of its device.
    Directory(Vec<u8>),
    /// A disk, by its serial number, with a file system that the kernel finds out.
    Disk(Vec<u8>),
}

/// What becomes of writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writes {
    /// They are refused.
    Refused,
    /// They stay in memory, in a layer over what is there.
    Private,
    /// They go through.
    Through,
}

impl Orders {
    /// Their bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.port.to_le_bytes().to_vec();
        put_string(&mut out, &self.hostname);
        put_number(&mut out, usize::from(self.root.is_some()));
        put_number(&mut out, self.volumes.len());
        for volume in self.root.iter().chain(&self.volumes) {
            volume.encode(&mut out);
        }
        out.extend([self.systemd, self.changes].map(u8::from));
        put_number(&mut out, self.interfaces.len());
        self.interfaces.iter().for_each(|interface| interface.encode(&mut out));
        out
    }

    /// Reads them.
    ///
    /// # Errors
    /// The bytes are no orders.
    pub fn decode(bytes: &[u8]) -> Result<Orders, Malformed> {
        let mut body = Body(bytes);
        let (port, hostname) = (body.word()?, body.string()?.to_vec());
        let has_root = body.word()? != 0;
        let count = body.word()?;
        let root = has_root.then(|| Volume::decode(&mut body)).transpose()?;
        let volumes = (0..count).map(|_| Volume::decode(&mut body)).collect::<Result<_, _>>()?;
        let (systemd, changes) = (body.byte()? != 0, body.byte()? != 0);
        let interfaces = body.list(Interface::decode)?;
        Ok(Orders { port, hostname, root, volumes, systemd, changes, interfaces })
    }
}

impl Interface {
    fn encode(&self, out: &mut Vec<u8>) {
        put_string(out, self.mac.as_ref().map_or(&[], |mac| mac.as_slice()));
        put_number(out, self.addresses.len());
        for (address, prefix) in &self.addresses {
            put_address(out, *address);
            out.push(*prefix);
        }
        for list in [&self.gateways, &self.servers] {
            put_number(out, list.len());
            list.iter().for_each(|address| put_address(out, *address));
        }
    }

    fn decode(body: &mut Body<'_>) -> Result<Interface, Malformed> {
        let mac = body.string()?;
        let mac = (!mac.is_empty()).then(|| mac.try_into()).transpose();
        Ok(Interface {
            mac: mac.map_err(|_| Malformed("an Ethernet address is none"))?,
            addresses: body.list(|body| Ok((take_address(body)?, body.byte()?)))?,
            gateways: body.list(take_address)?,
            servers: body.list(take_address)?,
        })
    }
}

fn put_address(out: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => put_string(out, &address.octets()),
        IpAddr::V6(address) => put_string(out, &address.octets()),
    }
}

fn take_address(body: &mut Body<'_>) -> Result<IpAddr, Malformed> {
    let bytes = body.string()?;
    let four = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let address = four.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from));
    address.map_err(|_| Malformed("an IP address is none"))
}

impl Volume {
    fn encode(&self, out: &mut Vec<u8>) {
        let (kind, name) = match &self.source {
            Source::Directory(tag) => (0, tag),
            Source::Disk(serial) => (1, serial),
        };
        out.extend([kind, self.writes as u8]);
        put_string(out, name);
        put_string(out, &self.place);
    }

    fn decode(body: &mut Body<'_>) -> Result<Volume, Malformed> {
        let (kind, writes) = (body.byte()?, body.byte()?);
        let (name, place) = (body.string()?.to_vec(), body.string()?.to_vec());
        Ok(Volume {
            source: match kind {
                0 => Source::Directory(name),
                1 => Source::Disk(name),
                _ => return Err(Malformed("a volume is of an unknown kind")),
            },
            place,
            writes: [Writes::Refused, Writes::Private, Writes::Through]
                .into_iter()
                .find(|known| *known as u8 == writes)
                .ok_or(Malformed("writes are treated in an unknown way"))?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_read_as_they_were_written() {
        let volume = |source, place: &str, writes| Volume { source, place: place.into(), writes };
        let all = Orders {
            port: 1024,
            hostname: b"mayfly".to_vec(),
            root: Some(volume(Source::Directory(b"root".to_vec()), "/", Writes::Private)),
            volumes: vec![
                volume(Source::Directory(b"v1".to_vec()), "/a b\n", Writes::Through),
                volume(Source::Disk(b"d".to_vec()), "/d", Writes::Refused),
            ],
            systemd: false,
            changes: true,
            interfaces: vec![
                Interface {
                    mac: Some([2, 0, 0, 0, 0, 1]),
                    addresses: vec![([10, 0, 2, 15].into(), 24), ([0xfd00, 0, 0, 0, 0, 0, 0, 1].into(), 64)],
                    gateways: vec![[10, 0, 2, 2].into()],
                    servers: vec![[10, 0, 2, 2].into()],
                },
                Interface::default(),
            ],
        };
        for orders in [all, Orders::default()] {
            let bytes = orders.encode();
            assert_eq!(Orders::decode(&bytes), Ok(orders));
            for cut in 0..bytes.len() {
                assert!(Orders::decode(&bytes[..cut]).is_err(), "cut at {cut}");
            }
        }
    }
}
