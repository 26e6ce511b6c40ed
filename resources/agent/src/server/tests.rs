//! What the guest's end says in which order.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::wire::{Exec, FROM_GUEST, Message};

#[test]
fn an_exit_comes_after_what_the_kernel_has_said_before() {
    let (wire, mut host) = UnixStream::pair().unwrap();
    host.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let options = Options {
        trampoline: Vec::new(),
        init: false,
        sync: false,
        fresh: false,
        messages: false,
        another: Vec::new(),
    };
    let mut server = Server::new(wire.into(), options).unwrap();
    // Each read of it gives a record, as of the kernel's log.
    let (log, kernel) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap();
    rustix::io::write(&kernel, b"4,1,2,-;BUG: late\n").unwrap();
    server.messages = Some(KernelLog::from(log));
    // The host is behind: there is no room for anything more.
    let early = Frame::Message(Message { text: vec![b'x'; 1000], ..Message::default() });
    while server.out.len() < HIGH {
        server.send(&early);
    }
    let exec = Exec { argv: vec![b"/bin/true".to_vec()], directory: b"/".to_vec(), ..Exec::default() };
    let started = process::start(&exec, &[]).map_err(|outcome| format!("{outcome:?}")).unwrap();
    let mut program = Program::new(started);
    program.outputs.iter_mut().for_each(|output| output.fd = None);
    waitpid(Some(program.pid), WaitOptions::empty()).unwrap();
    program.outcome = Some(Outcome::Code(0));
    server.programs.insert(1, program);
    server.finish();
    let serving = std::thread::spawn(move || server.serve());
    let (mut decoder, mut bytes, mut late) = (Decoder::new(FROM_GUEST), vec![0; 4096], false);
    let exit = loop {
        match decoder.next_frame().unwrap() {
            Some(Frame::Message(message)) => late |= message.text == b"BUG: late",
            Some(Frame::Exit { id, outcome }) => break (id, outcome),
            Some(_) => {}
            None => {
                let n = host.read(&mut bytes).unwrap();
                assert!(n > 0, "the server has ended");
                decoder.feed(&bytes[..n]);
            }
        }
    };
    assert_eq!(exit, (1, Outcome::Code(0)));
    assert!(late, "the exit came first");
    drop(host);
    assert!(matches!(serving.join().unwrap(), Ok(End::Closed)));
}
