//! A DHCP server (RFC 2131) for one client: it always gets the same address.

use std::net::Ipv4Addr;

use super::packet::long;

/// The port of the server, and of clients.
pub const SERVER: u16 = 67;
/// See [`SERVER`].
pub const CLIENT: u16 = 68;

const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Seconds for which an address is lent.
const LEASE: u32 = 86_400;

/// What clients are told.
#[derive(Clone, Debug)]
pub struct Lease {
    /// The client's address, in a network of 24 bits.
    pub client: Ipv4Addr,
    /// Router, name server, and the server itself.
    pub gateway: Ipv4Addr,
    /// Bytes of an IP packet.
    pub mtu: u16,
    /// The name servers there are: none if the host has none.
    pub dns: bool,
}

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// The answer to a message of a client, if it is owed one.
pub fn answer(message: &[u8], lease: &Lease) -> Option<Vec<u8>> {
    let [1, 1, 6, _] = *message.first_chunk::<4>()? else { return None };
    let fixed = message.get(..236)?;
    let options = message.get(236..)?.strip_prefix(&COOKIE)?;
    let kind = *find(options, 53)?.first()?;
    let current = long(fixed, 12).map(Ipv4Addr::from)?;
    let asked = find(options, 50).and_then(|bytes| long(bytes, 0)).map_or(current, Ipv4Addr::from);
    let other_server = find(options, 54).is_some_and(|id| id != lease.gateway.octets());
    let inform = kind == INFORM;
    let kind = match kind {
        DISCOVER => OFFER,
        REQUEST if other_server => return None,
        REQUEST if asked == lease.client => ACK,
        REQUEST => NAK,
        INFORM => ACK,
        _ => return None,
    };
    let mut answer = Vec::with_capacity(300);
    answer.extend([2, 1, 6, 0]);
    answer.extend(fixed.get(4..8)?); // transaction
    answer.extend([0, 0]);
    answer.extend(fixed.get(10..12)?); // flags
    answer.extend(if kind == NAK { [0; 4] } else { current.octets() });
    answer.extend(if kind == NAK || inform { [0; 4] } else { lease.client.octets() });
    answer.extend(lease.gateway.octets());
    answer.extend([0; 4]);
    answer.extend(fixed.get(28..44)?); // the client's Ethernet address
    answer.extend([0; 192]);
    answer.extend(COOKIE);
    let mut option = |code: u8, value: &[u8]| {
        answer.extend([code, u8::try_from(value.len()).unwrap_or(0)]);
        answer.extend(value);
    };
    option(53, &[kind]);
    option(54, &lease.gateway.octets());
    if kind != NAK {
        if !inform {
            option(51, &LEASE.to_be_bytes());
        }
        option(1, &[255, 255, 255, 0]);
        option(3, &lease.gateway.octets());
        if lease.dns {
            option(6, &lease.gateway.octets());
        }
        option(26, &lease.mtu.to_be_bytes());
    }
    answer.push(255);
    // Some clients want the 300 bytes of BOOTP (RFC 1542, section 2.1).
    answer.resize(answer.len().max(300), 0);
    Some(answer)
}

/// The value of an option.
fn find(mut options: &[u8], wanted: u8) -> Option<&[u8]> {
    loop {
        let (code, rest) = options.split_first()?;
        options = match code {
            0 => rest,
            255 => return None,
            _ => {
                let (len, rest) = rest.split_first()?;
                let (value, rest) = rest.split_at_checked(usize::from(*len))?;
                if *code == wanted {
                    return Some(value);
                }
                rest
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lease() -> Lease {
        Lease { client: [10, 0, 2, 15].into(), gateway: [10, 0, 2, 2].into(), mtu: 1500, dns: true }
    }

    fn message(kind: u8, options: &[u8]) -> Vec<u8> {
        let mut message = vec![0; 236];
        message[..8].copy_from_slice(&[1, 1, 6, 0, 1, 2, 3, 4]);
        message[28..34].copy_from_slice(&[2, 3, 4, 5, 6, 7]);
        message.extend(COOKIE);
        message.extend([53, 1, kind]);
        message.extend(options);
        message.push(255);
        message
    }

    fn kind(answer: &[u8]) -> u8 {
        find(&answer[240..], 53).unwrap()[0]
    }

    #[test]
    fn a_client_is_offered_and_given_its_address() {
        let offer = answer(&message(DISCOVER, &[]), &lease()).unwrap();
        assert_eq!(
            (kind(&offer), &offer[16..20], &offer[4..8]),
            (OFFER, &[10, 0, 2, 15][..], &[1, 2, 3, 4][..])
        );
        let given = answer(&message(REQUEST, &[50, 4, 10, 0, 2, 15, 54, 4, 10, 0, 2, 2]), &lease()).unwrap();
        assert_eq!(kind(&given), ACK);
        assert_eq!(find(&given[240..], 3), Some(&[10, 0, 2, 2][..]));
        assert_eq!(find(&given[240..], 26), Some(&[5, 0xdc][..]));
    }

    #[test]
    fn other_addresses_are_refused_and_other_servers_left_alone() {
        let refused = answer(&message(REQUEST, &[50, 4, 192, 168, 0, 9]), &lease()).unwrap();
        assert_eq!((kind(&refused), &refused[16..20]), (NAK, &[0; 4][..]));
        assert_eq!(answer(&message(REQUEST, &[54, 4, 10, 0, 2, 9]), &lease()), None);
        assert_eq!(answer(&message(7, &[]), &lease()), None, "a release is not answered");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = answer(&bytes, &lease());
            let mut message = message(DISCOVER, &bytes);
            message.pop();
            let _ = answer(&message, &lease());
        }
    }
}
