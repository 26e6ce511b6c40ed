//! The header of a packet (virtio 1.2, section 5.10.6), as both sides write it.

/// Bytes of a header.
pub const HEADER: usize = 44;
/// The same as a length in a chain.
pub const HEADER_LEN: u64 = HEADER as u64;
/// The context ID of the host.
pub const HOST_CID: u64 = 2;
/// Stream sockets; there are no others here.
pub const STREAM: u16 = 1;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Refuses one, or ends it at once.
    Reset,
    /// The sender will not send ([`SHUT_SEND`]) or not receive ([`SHUT_RECEIVE`]) any more.
    Shutdown,
    /// Carries bytes.
    Data,
    /// Tells how much room there is.
    CreditUpdate,
    /// Asks how much room there is.
    CreditRequest,
}

const OPS: [(u16, Op); 7] = [
    (1, Op::Request),
    (2, Op::Response),
    (3, Op::Reset),
    (4, Op::Shutdown),
    (5, Op::Data),
    (6, Op::CreditUpdate),
    (7, Op::CreditRequest),
];

/// Flag of [`Op::Shutdown`]: the sender of the packet receives no more.
pub const SHUT_RECEIVE: u32 = 1;
/// Flag of [`Op::Shutdown`]: the sender of the packet sends no more.
pub const SHUT_SEND: u32 = 2;

/// A header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Context ID of the sender.
    pub src_cid: u64,
    /// Context ID of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes that follow.
    pub len: u32,
    /// The kind of socket.
    pub kind: u16,
    /// What it is for; `None`: a number without meaning.
    pub op: Option<Op>,
    /// Of [`Op::Shutdown`].
    pub flags: u32,
    /// Bytes the sender keeps for its reader.
    pub buf_alloc: u32,
    /// Bytes its reader has taken so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads a header.
    pub fn read(bytes: &[u8; HEADER]) -> Header {
        let mut at = 0usize;
        let mut number = |len: usize| {
            let end = at.saturating_add(len);
            let mut value = [0u8; 8];
            let from = bytes.get(at..end).unwrap_or_default();
            value.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            at = end;
            u64::from_le_bytes(value)
        };
        // A number of so many bytes fits into the type of that size.
        let (src_cid, dst_cid) = (number(8), number(8));
        let mut word = |len| u32::try_from(number(len)).unwrap_or_default();
        let (src_port, dst_port, len) = (word(4), word(4), word(4));
        let [kind, op] = [word(2), word(2)].map(|half| u16::try_from(half).unwrap_or_default());
        let (flags, buf_alloc, fwd_cnt) = (word(4), word(4), word(4));
        let op = OPS.iter().find(|(number, _)| *number == op).map(|(_, op)| *op);
        Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt }
    }

    /// The bytes of the header.
    pub fn bytes(&self) -> [u8; HEADER] {
        let op = OPS.iter().find(|(_, op)| Some(*op) == self.op).map_or(0, |(number, _)| *number);
        let mut bytes = [0; HEADER];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        bytes.iter_mut().zip(fields.into_iter().flatten()).for_each(|(to, from)| *to = *from);
        bytes
    }

    /// The answer that ends the connection this packet speaks of.
    pub fn reset(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            op: Some(Op::Reset),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_the_layout_of_the_specification() {
        let mut bytes = [0u8; HEADER];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::try_from(at).unwrap() + 1;
        }
        bytes[30..32].copy_from_slice(&5u16.to_le_bytes());
        let header = Header::read(&bytes);
        assert_eq!((header.src_cid, header.dst_cid), (0x0807_0605_0403_0201, 0x100f_0e0d_0c0b_0a09));
        assert_eq!((header.src_port, header.dst_port, header.len), (0x1413_1211, 0x1817_1615, 0x1c1b_1a19));
        assert_eq!((header.kind, header.op, header.flags), (0x1e1d, Some(Op::Data), 0x2423_2221));
        assert_eq!((header.buf_alloc, header.fwd_cnt), (0x2827_2625, 0x2c2b_2a29));
        assert_eq!(header.bytes(), bytes);
        bytes[30] = 8;
        assert_eq!(Header::read(&bytes).op, None, "a number without meaning");
    }
}
