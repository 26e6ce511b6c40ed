//! The header before each frame in a queue: `struct virtio_net_hdr`, section 5.1.6.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Its length in bytes, `num_buffers` included (always so with `VIRTIO_F_VERSION_1`).
pub const HEADER: u64 = 12;

/// What the device says about a frame for the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Where the checksum begins and how far behind that it is stored; the guest computes it if it wants to.
    pub checksum: Option<(u16, u16)>,
    /// A large segment, to be seen as many of so many bytes.
    pub segment: Option<Segment>,
    /// Bytes of all protocol headers of a large segment.
    pub len: u16,
}

/// The size of the pieces of a large TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// TCP payload of each piece, in bytes.
    pub size: u16,
    /// It is over IPv6.
    pub v6: bool,
}

impl Header {
    /// The bytes for the guest; the frame takes `buffers` buffers.
    pub fn bytes(&self, buffers: u16) -> [u8; 12] {
        let narrow = |value: u32| u8::try_from(value).unwrap_or_default();
        let flags = if self.checksum.is_some() { VIRTIO_NET_HDR_F_NEEDS_CSUM } else { 0 };
        let kind = match self.segment {
            None => VIRTIO_NET_HDR_GSO_NONE,
            Some(Segment { v6: false, .. }) => VIRTIO_NET_HDR_GSO_TCPV4,
            Some(Segment { v6: true, .. }) => VIRTIO_NET_HDR_GSO_TCPV6,
        };
        let (start, offset) = self.checksum.unwrap_or_default();
        let [len0, len1] = self.len.to_le_bytes();
        let [size0, size1] = self.segment.map_or(0, |segment| segment.size).to_le_bytes();
        let [start0, start1] = start.to_le_bytes();
        let [offset0, offset1] = offset.to_le_bytes();
        let [buffers0, buffers1] = buffers.to_le_bytes();
        let (flags, kind) = (narrow(flags), narrow(kind));
        [flags, kind, len0, len1, size0, size1, start0, start1, offset0, offset1, buffers0, buffers1]
    }
}
