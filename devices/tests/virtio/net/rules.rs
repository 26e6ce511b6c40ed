//! Where the guest may go, and the name service that the rules hang on.

use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::thread;

use smoltcp::socket::{icmp, tcp};
use smoltcp::wire::Ipv4Address;

use super::guest::*;

/// A resolver that says 192.0.2.7 is at every name; how many questions it answers.
fn resolver(questions: usize) -> (u16, thread::JoinHandle<Vec<Vec<u8>>>) {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let work = move || {
        let mut asked = Vec::new();
        for _ in 0..questions {
            let mut data = vec![0; 512];
            let (len, from) = server.recv_from(&mut data).unwrap();
            data.truncate(len);
            asked.push(data.clone());
            data[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1]);
            data.extend(b"\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\xc0\0\x02\x07");
            server.send_to(&data, from).unwrap();
        }
        asked
    };
    (port, thread::spawn(work))
}

fn query(name: &str) -> Vec<u8> {
    let mut query = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        query.push(u8::try_from(label.len()).unwrap());
        query.extend(label.bytes());
    }
    query.extend(b"\0\0\x01\0\x01");
    query
}

/// How a connection to an address ends, or that it was tried at all (in a net without 192.0.2.0/24 nobody answers).
fn fate(guest: &mut Guest, to: Ipv4Address, port: u16) -> &'static str {
    let (before, refused) = (guest.meter("flows"), guest.meter("refused_flows"));
    let handle = guest.begin(to, port);
    guest
        .until("a decision", |guest| guest.meter("flows") > before || guest.meter("refused_flows") > refused);
    let tried = guest.meter("flows") > before;
    guest.tcp(handle).abort();
    guest.until("its end", |guest| guest.tcp(handle).state() == tcp::State::Closed);
    if tried { "tried" } else { "barred" }
}

#[test]
fn names_are_asked_at_the_hosts_resolver() {
    let (port, server) = resolver(1);
    let mut guest = Guest::new(&format!("user,dns=127.0.0.1:{port}"), ALL);
    let own = guest.udp(5353);
    guest.send_to(own, &query("example.org"), GATEWAY, 53);
    let (answer, from) = guest.receive_from(own);
    assert!(answer.ends_with(&[192, 0, 2, 7]) && from.port == 53);
    assert_eq!(server.join().unwrap(), [query("example.org")]);
}

#[test]
fn long_answers_come_over_tcp() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut asked = vec![0; 31];
        stream.read_exact(&mut asked).unwrap();
        stream.write_all(&[&[0xff, 0xff][..], &[7; 65_535]].concat()).unwrap();
    });
    let mut guest = Guest::new(&format!("user,dns=127.0.0.1:{port}"), ALL);
    let handle = guest.connect(GATEWAY, 53);
    let question = query("example.org");
    guest.send(handle, &[&[0, 29][..], &question].concat());
    assert_eq!(guest.receive(handle, 65_537)[65_536], 7);
    server.join().unwrap();
}

#[test]
fn without_rules_only_the_hosts_own_is_barred() {
    let mut guest = Guest::new("user,dns=127.0.0.1", ALL);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    assert_eq!(fate(&mut guest, GATEWAY, port), "barred", "loopback has to be asked for");
    assert_eq!(fate(&mut guest, Ipv4Address::new(127, 0, 0, 1), port), "barred");
    assert_eq!(
        fate(&mut guest, Ipv4Address::new(0, 0, 0, 0).max(Ipv4Address::new(0, 0, 0, 1)), port),
        "barred"
    );
    assert_eq!(fate(&mut guest, Ipv4Address::new(169, 254, 169, 254), 80), "barred");
    assert_eq!(fate(&mut guest, Ipv4Address::new(192, 0, 2, 2), 9), "tried");
}

#[test]
fn a_rule_for_a_name_opens_its_address_once_it_is_resolved() {
    let (port, server) = resolver(1);
    let mut guest =
        Guest::new(&format!("user,dns=127.0.0.1:{port},allow=*.example.org:443,allow=198.51.100.0/24"), ALL);
    let there = Ipv4Address::new(192, 0, 2, 7);
    assert_eq!(fate(&mut guest, there, 443), "barred", "nobody has resolved it");
    assert_eq!(fate(&mut guest, Ipv4Address::new(198, 51, 100, 9), 1), "tried");

    let own = guest.udp(5353);
    guest.send_to(own, &query("evil.net"), GATEWAY, 53);
    let (answer, _) = guest.receive_from(own);
    assert_eq!(answer[3] & 15, 5, "a name without a rule is refused, and never leaves this machine");
    guest.send_to(own, &query("www.Example.org"), GATEWAY, 53);
    assert!(guest.receive_from(own).0.ends_with(&[192, 0, 2, 7]));
    assert_eq!(server.join().unwrap(), [query("www.Example.org")]);

    assert_eq!(fate(&mut guest, there, 443), "tried");
    assert_eq!(fate(&mut guest, there, 80), "barred", "another port");
    assert_eq!(fate(&mut guest, Ipv4Address::new(192, 0, 2, 8), 443), "barred", "another address");
    assert_eq!(fate(&mut guest, GATEWAY, 53), "barred", "names over TCP would not be read");

    // Datagrams are under the same rules: the guest hears that it may not.
    let errors = guest.icmp(icmp::Endpoint::Udp(5353.into()));
    guest.send_to(own, b"tunnel", Ipv4Address::new(8, 8, 8, 8), 53);
    guest.until("a word of it", |guest| guest.sockets.get_mut::<icmp::Socket>(errors).can_recv());
}

#[test]
fn rules_count_for_the_loopback_too() {
    let open = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = open.local_addr().unwrap().port();
    let text = format!("user,dns=127.0.0.1,loopback=on,allow=10.0.2.2:{port}");
    let mut guest = Guest::new(&text, ALL);
    guest.connect(GATEWAY, port);
    assert_eq!(fate(&mut guest, GATEWAY, port ^ 1), "barred");
    let mut guest = Guest::new(&format!("user,dns=127.0.0.1,allow=10.0.2.2:{port}"), ALL);
    assert_eq!(fate(&mut guest, GATEWAY, port), "barred", "a rule does not open what is off");
}
