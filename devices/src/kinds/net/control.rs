//! Commands of the control queue (section 5.1.6.5).

use base::memory::Ram;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC,
    VIRTIO_NET_CTRL_MAC_ADDR_SET, VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_ALLMULTI,
    VIRTIO_NET_CTRL_RX_PROMISC,
};

use crate::net::user::packet::Mac;
use crate::virtio::Chain;

/// A command of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Receive everything, or all multicast: nothing is ever kept from the guest, so this is done already.
    Receive,
    /// A list of addresses to receive for: nothing is kept from the guest.
    Table,
    /// The card has this address from now on.
    Address(Mac),
    /// So many pairs of queues are used from now on.
    Pairs(u16),
    /// The driver takes these offloads from now on.
    Offloads(u64),
}

/// Reads a command; `None` if there is no such.
pub fn read(chain: &Chain, ram: &Ram) -> Option<Command> {
    let mut bytes = [0; 10];
    let len = chain.readable().read(ram, 0, &mut bytes);
    let [class, command, value @ ..] = bytes;
    let [a, b, c, d, e, f, ..] = value;
    let kind = (u32::from(class), u32::from(command));
    match (kind, len) {
        ((VIRTIO_NET_CTRL_RX, VIRTIO_NET_CTRL_RX_PROMISC | VIRTIO_NET_CTRL_RX_ALLMULTI), 3..) => {
            Some(Command::Receive)
        }
        ((VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_TABLE_SET), 10..) => Some(Command::Table),
        ((VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET), 8..) if a & 1 == 0 => {
            Some(Command::Address([a, b, c, d, e, f]))
        }
        ((VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET), 4..) => {
            Some(Command::Pairs(u16::from_le_bytes([a, b])))
        }
        ((VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET), 10..) => {
            Some(Command::Offloads(u64::from_le_bytes(value)))
        }
        _ => None,
    }
}
