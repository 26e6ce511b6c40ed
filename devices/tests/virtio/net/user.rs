//! The NAT, between a guest's own stack and real sockets of this machine.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use smoltcp::socket::{dhcpv4, icmp, tcp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpCidr, Ipv4Cidr};

use super::guest::*;

const OPEN: &str = "user,loopback=on,dns=127.0.0.1";

fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A port that nobody has now.
fn free_port() -> u16 {
    listen().1
}

/// Serves one connection.
fn serve(work: impl FnOnce(TcpStream) + Send + 'static) -> (u16, thread::JoinHandle<()>) {
    let (listener, port) = listen();
    (port, thread::spawn(move || work(listener.accept().unwrap().0)))
}

#[test]
fn a_client_gets_an_address_by_dhcp() {
    let mut guest = Guest::new(OPEN, ALL);
    guest.stack.update_ip_addrs(|list| list.clear());
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let mut lease = None;
    guest.until("a lease", |guest| {
        if let Some(dhcpv4::Event::Configured(config)) =
            guest.sockets.get_mut::<dhcpv4::Socket>(handle).poll()
        {
            lease = Some((config.address, config.router, config.dns_servers.to_vec()));
        }
        lease.is_some()
    });
    assert_eq!(lease, Some((Ipv4Cidr::new(GUEST, 24), Some(GATEWAY), vec![GATEWAY])));
    guest.stack.update_ip_addrs(|list| list.push(IpCidr::new(GUEST.into(), 24)).unwrap());
    let (port, server) = serve(|mut stream| stream.write_all(b"hello").unwrap());
    let handle = guest.connect(GATEWAY, port);
    assert_eq!(guest.receive(handle, 5), b"hello");
    server.join().unwrap();
}

#[test]
fn data_pass_both_ways_whatever_the_driver_knows() {
    for features in
        [PLAIN, F_MERGE, F_CSUM | F_GUEST_CSUM | F_MERGE, F_GUEST_CSUM | F_GUEST_TSO | F_MERGE, ALL]
    {
        for ipv6 in [false, true] {
            let mut guest = Guest::new(OPEN, features);
            let listener = TcpListener::bind(if ipv6 { "[::1]:0" } else { "127.0.0.1:0" }).unwrap();
            let port = listener.local_addr().unwrap().port();
            let server = thread::spawn(move || {
                let mut stream = listener.accept().unwrap().0;
                let mut data = vec![0; 1 << 20];
                stream.read_exact(&mut data).unwrap();
                stream.write_all(&data).unwrap();
                assert_eq!(stream.read(&mut [0]).unwrap(), 0, "the guest ends first");
            });
            let handle = if ipv6 { guest.connect(GATEWAY6, port) } else { guest.connect(GATEWAY, port) };
            let data = pattern(1 << 20);
            guest.send(handle, &data);
            let back = guest.receive(handle, data.len());
            assert!(back == data, "{features:#x} {ipv6}: the same bytes");
            guest.tcp(handle).close();
            guest.until("the end", |guest| {
                !guest.tcp(handle).is_active() || guest.tcp(handle).state() == tcp::State::TimeWait
            });
            server.join().unwrap();
            if features & F_GUEST_TSO != 0 {
                assert!(guest.card.largest > 16_000, "large segments: {}", guest.card.largest);
            }
            assert_eq!(guest.meter("faults"), 0);
        }
    }
}

#[test]
fn a_large_mtu_makes_large_segments_both_ways() {
    let mut guest = Guest::new("user,loopback=on,mtu=65520,dns=127.0.0.1", ALL);
    let (port, server) = serve(|mut stream| {
        let mut data = vec![0; 4 << 20];
        stream.read_exact(&mut data).unwrap();
        stream.write_all(&data).unwrap();
    });
    let handle = guest.connect(GATEWAY, port);
    let data = pattern(4 << 20);
    // The server answers only when it has everything: no more than the buffers hold need be in flight.
    guest.send(handle, &data);
    assert!(guest.receive(handle, data.len()) == data);
    server.join().unwrap();
    let frames = guest.meter("sent_frames");
    assert!(frames < 4000, "4 MiB in {frames} frames");
}

#[test]
fn each_half_of_a_connection_ends_on_its_own() {
    // The guest ends first and goes on reading.
    let mut guest = Guest::new(OPEN, ALL);
    let (port, server) = serve(|mut stream| {
        let mut said = Vec::new();
        stream.read_to_end(&mut said).unwrap();
        stream.write_all(&said).unwrap();
    });
    let handle = guest.connect(GATEWAY, port);
    guest.send(handle, b"question");
    guest.tcp(handle).close();
    assert_eq!(guest.receive(handle, 8), b"question");
    server.join().unwrap();

    // The other side ends first and goes on reading.
    let (port, server) = serve(|mut stream| {
        stream.write_all(b"answer").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut said = Vec::new();
        stream.read_to_end(&mut said).unwrap();
        assert_eq!(said, b"still here");
    });
    let handle = guest.connect(GATEWAY, port);
    assert_eq!(guest.receive(handle, 6), b"answer");
    guest.until("its end", |guest| guest.tcp(handle).state() == tcp::State::CloseWait);
    guest.send(handle, b"still here");
    guest.tcp(handle).close();
    guest.until("the end", |guest| !guest.tcp(handle).is_active());
    server.join().unwrap();
}

#[test]
fn resets_pass_both_ways() {
    let mut guest = Guest::new(OPEN, ALL);
    let (port, server) = serve(|mut stream| {
        stream.write_all(b"x").unwrap();
        let answer = stream.read(&mut [0; 16]);
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::ConnectionReset);
    });
    let handle = guest.connect(GATEWAY, port);
    guest.receive(handle, 1);
    guest.tcp(handle).abort();
    guest.until("the reset to be sent", |guest| guest.tcp(handle).state() == tcp::State::Closed);
    server.join().unwrap();

    // Closing with something unread sends a reset.
    let (port, server) = serve(|stream| {
        let mut one = [0];
        (&stream).read_exact(&mut one).unwrap();
        assert!(stream.peek(&mut [0; 4]).unwrap() > 0);
    });
    let handle = guest.connect(GATEWAY, port);
    guest.send(handle, b"unread");
    guest.until("a reset", |guest| guest.tcp(handle).state() == tcp::State::Closed);
    server.join().unwrap();
}

#[test]
fn a_port_where_nobody_listens_refuses() {
    let mut guest = Guest::new(OPEN, ALL);
    let handle = guest.begin(GATEWAY, free_port());
    guest.until("a reset", |guest| guest.tcp(handle).state() == tcp::State::Closed);
    assert_eq!(guest.meter("refused_flows"), 1);
    // And for datagrams there is a word of ICMP.
    let (errors, own) = (guest.icmp(icmp::Endpoint::Udp(5000.into())), guest.udp(5000));
    let port = free_port();
    guest.send_to(own, b"anybody?", GATEWAY, port);
    guest.until("port unreachable", |guest| guest.sockets.get_mut::<icmp::Socket>(errors).can_recv());
}

#[test]
fn two_hundred_connections_at_once() {
    let mut guest = Guest::new(OPEN, ALL);
    let (listener, port) = listen();
    let server = thread::spawn(move || {
        let streams: Vec<TcpStream> = (0..200).map(|_| listener.accept().unwrap().0).collect();
        for mut stream in streams.into_iter().rev() {
            let mut data = vec![0; 8192];
            stream.read_exact(&mut data).unwrap();
            stream.write_all(&data).unwrap();
        }
    });
    let handles: Vec<_> = (0..200).map(|_| guest.begin(GATEWAY, port)).collect();
    for (n, handle) in handles.iter().enumerate() {
        guest.until("a connection", |guest| guest.tcp(*handle).may_send());
        guest.send(*handle, &vec![n.to_le_bytes()[0]; 8192]);
    }
    for (n, handle) in handles.iter().enumerate() {
        assert!(guest.receive(*handle, 8192) == vec![n.to_le_bytes()[0]; 8192], "connection {n}");
        guest.tcp(*handle).close();
    }
    server.join().unwrap();
    assert_eq!(guest.meter("flows"), 200);
}

#[test]
fn a_slow_reader_holds_the_sender_up_and_loses_nothing() {
    // The host is slow: the guest's window closes, and opens again.
    let mut guest = Guest::new(OPEN, ALL);
    let (go, wait) = std::sync::mpsc::channel();
    let (port, server) = serve(move |mut stream| {
        wait.recv().unwrap();
        let mut data = Vec::new();
        stream.read_to_end(&mut data).unwrap();
        assert!(data == pattern(data.len()), "in order");
        stream.write_all(&u32::try_from(data.len()).unwrap().to_be_bytes()).unwrap();
    });
    let handle = guest.connect(GATEWAY, port);
    let data = pattern(32 << 20);
    let mut sent = 0;
    // Until nothing more goes: for a while the guest's own buffer is full.
    let mut idle = 0;
    guest.until("the pipe to be full", |guest| {
        let len = guest.tcp(handle).send_slice(&data[sent..]).unwrap();
        sent += len;
        idle = if len < 1000 { idle + 1 } else { 0 };
        idle > 2 || sent == data.len()
    });
    go.send(()).unwrap();
    guest.send(handle, &data[sent..]);
    guest.tcp(handle).close();
    assert_eq!(guest.receive(handle, 4), u32::try_from(data.len()).unwrap().to_be_bytes());
    server.join().unwrap();

    // The guest is slow: what it does not take stays with the sender.
    let (port, server) = serve(|mut stream| stream.write_all(&pattern(16 << 20)).unwrap());
    let handle = guest.connect(GATEWAY, port);
    guest.until("the window to be full", |guest| guest.tcp(handle).recv_queue() == 256 << 10);
    assert!(!server.is_finished(), "the sender waits");
    assert!(guest.receive(handle, 16 << 20) == pattern(16 << 20));
    server.join().unwrap();
}

#[test]
fn what_the_guest_loses_is_sent_again() {
    let mut guest = Guest::new(OPEN, F_GUEST_CSUM | F_MERGE);
    let (port, server) = serve(|mut stream| {
        stream.write_all(&pattern(1 << 20)).unwrap();
        let mut data = vec![0; 1 << 20];
        stream.read_exact(&mut data).unwrap();
        assert!(data == pattern(1 << 20));
    });
    let handle = guest.connect(GATEWAY, port);
    guest.card.lose_one_of = 100;
    assert!(guest.receive(handle, 1 << 20) == pattern(1 << 20), "nothing is missing, nothing twice");
    guest.card.lose_one_of = 0;
    guest.card.lose_next = 2;
    guest.send(handle, &pattern(1 << 20));
    guest.until("all to be acknowledged", |guest| guest.tcp(handle).send_queue() == 0);
    server.join().unwrap();
}

#[test]
fn published_ports_lead_into_the_guest() {
    let (tcp_port, udp_port) = (free_port(), free_port());
    let mut guest = Guest::new(&format!("{OPEN},publish={tcp_port}:80,publish={udp_port}:53/udp"), ALL);
    let handle = guest.listen(80);
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(("127.0.0.1", tcp_port)).unwrap();
        stream.write_all(&pattern(100_000)).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        assert!(back == pattern(100_000));
    });
    let data = guest.receive(handle, 100_000);
    guest.send(handle, &data);
    guest.tcp(handle).close();
    guest.until("the end", |guest| !guest.tcp(handle).is_active());
    client.join().unwrap();

    // Nobody listens in the guest: its reset reaches the client.
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(("127.0.0.1", tcp_port)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    });
    guest.until("the reset", |_| client.is_finished());
    client.join().unwrap();

    let own = guest.udp(53);
    let peer = UdpSocket::bind("127.0.0.1:0").unwrap();
    peer.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    peer.send_to(b"ping", ("127.0.0.1", udp_port)).unwrap();
    let (data, from) = guest.receive_from(own);
    assert_eq!((data.as_slice(), from.addr), (&b"ping"[..], GATEWAY.into()));
    guest.send_to(own, b"pong", from.addr, from.port);
    let mut back = [0; 16];
    let reader = thread::spawn(move || (peer.recv_from(&mut back).unwrap(), back));
    guest.until("the answer", |_| reader.is_finished());
    let ((len, from), back) = reader.join().unwrap();
    assert_eq!((&back[..len], from.port()), (&b"pong"[..], udp_port));
}

#[test]
fn datagrams_pass_in_any_size() {
    for (features, mtu) in [(PLAIN, 1500), (ALL, 1500), (ALL, 65_520)] {
        let mut guest = Guest::new(&format!("{OPEN},mtu={mtu}"), features);
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = server.local_addr().unwrap().port();
        let echo = thread::spawn(move || {
            let mut data = vec![0; 65_536];
            for _ in 0..3 {
                let (len, from) = server.recv_from(&mut data).unwrap();
                server.send_to(&data[..len], from).unwrap();
            }
        });
        let own = guest.udp(6000);
        // The guest's stack puts fragments together up to 1500 bytes only, so what is larger is for the large MTU.
        for len in [0, 1, if mtu > 1500 { 60_000 } else { 1472 }] {
            let data = pattern(len);
            guest.send_to(own, &data, GATEWAY, port);
            let (back, from) = guest.receive_from(own);
            assert!(back == data && from.port == port, "{len} bytes");
        }
        echo.join().unwrap();
    }
}

#[test]
fn the_gateway_answers_a_ping() {
    let mut guest = Guest::new(OPEN, ALL);
    let handle = guest.icmp(icmp::Endpoint::Ident(7));
    let checksums = smoltcp::phy::ChecksumCapabilities::default();
    let ping = Icmpv4Repr::EchoRequest { ident: 7, seq_no: 1, data: b"are you there?" };
    let socket = guest.sockets.get_mut::<icmp::Socket>(handle);
    let room = socket.send(ping.buffer_len(), GATEWAY.into()).unwrap();
    ping.emit(&mut Icmpv4Packet::new_unchecked(room), &checksums);
    guest.until("an echo", |guest| guest.sockets.get_mut::<icmp::Socket>(handle).can_recv());
    let (answer, from) = guest.sockets.get_mut::<icmp::Socket>(handle).recv().unwrap();
    assert_eq!(from, GATEWAY.into());
    let answer = Icmpv4Repr::parse(&Icmpv4Packet::new_checked(answer).unwrap(), &checksums).unwrap();
    assert_eq!(answer, Icmpv4Repr::EchoReply { ident: 7, seq_no: 1, data: b"are you there?" });
}

#[test]
fn a_reset_of_the_device_ends_its_connections() {
    let mut guest = Guest::new(OPEN, ALL);
    let (port, server) = serve(|mut stream| {
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    });
    guest.connect(GATEWAY, port);
    guest.card.rig.set(super::super::driver::reg::STATUS, 0);
    server.join().unwrap();
}

#[test]
fn frames_are_recorded() {
    let host = base::host::fake::FakeHost::default();
    let mut guest = Guest::on(&format!("{OPEN},pcap=frames.pcap"), ALL, &host);
    let (port, server) = serve(|mut stream| stream.write_all(&pattern(100_000)).unwrap());
    let handle = guest.connect(GATEWAY, port);
    let data = guest.receive(handle, 100_000);
    server.join().unwrap();
    guest.card.rig.set(super::super::driver::reg::STATUS, 0);
    let mut bytes = Vec::new();
    let mut file = host.file(std::path::Path::new("frames.pcap")).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes[..4], 0xa1b2_c3d4u32.to_le_bytes());
    let (mut at, mut recorded) = (24, Vec::new());
    while at < bytes.len() {
        let len = usize::try_from(u32::from_le_bytes(bytes[at + 8..at + 12].try_into().unwrap())).unwrap();
        let frame = &bytes[at + 16..at + 16 + len];
        if frame[12..14] == [8, 0] && frame[23] == 6 && frame[34..36] == port.to_be_bytes() {
            recorded.extend(&frame[54..]);
        }
        at += 16 + len;
    }
    // Behind the greeting with its options, every byte that was sent.
    assert!(recorded.ends_with(&data), "{} bytes recorded", recorded.len());
}
