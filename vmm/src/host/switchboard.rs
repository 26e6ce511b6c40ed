//! Who inside this process answers the guest's calls.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use base::host::socket::is_hung_up;

/// Sockets that wait for a call at one port, at the most: a guest that does not call must not cost descriptors.
const WAITING: usize = 64;

/// Sockets for whoever calls a port of this process, each handed out once, in the order in which they were put there.
#[derive(Clone, Debug, Default)]
pub struct Switchboard(Arc<Mutex<HashMap<u32, VecDeque<OwnedFd>>>>);

impl Switchboard {
    /// Has a call of the guest's to `port` answered by `socket`. Where too many wait already it is closed.
    pub fn put(&self, port: u32, socket: OwnedFd) {
        let mut ports = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = ports.entry(port).or_default();
        waiting.retain(|socket| !is_hung_up(socket));
        if waiting.len() < WAITING {
            waiting.push_back(socket);
        }
    }

    /// The socket for a call to `port`; `None`: nobody answers. Those whose other end has gone are passed over.
    pub fn take(&self, port: u32) -> Option<OwnedFd> {
        let mut ports = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = ports.get_mut(&port)?;
        waiting.retain(|socket| !is_hung_up(socket));
        waiting.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_call_is_answered_by_the_first_who_still_waits() {
        let board = Switchboard::default();
        let pairs: Vec<_> = (0..3u8).map(|_| UnixStream::pair().unwrap()).collect();
        let mut ours = Vec::new();
        for (number, (mine, theirs)) in (0..).zip(pairs) {
            (&mine).write_all(&[number]).unwrap();
            ours.push(mine);
            board.put(7, theirs.into());
        }
        assert!(board.take(8).is_none());
        drop(ours.remove(0));
        for number in [1, 2] {
            let mut first = [0];
            rustix::io::read(board.take(7).unwrap(), &mut first).unwrap();
            assert_eq!(first, [number]);
        }
        assert!(board.take(7).is_none());
    }

    #[test]
    fn those_whom_no_guest_calls_are_bounded() {
        let board = Switchboard::default();
        let pairs: Vec<_> = (0..WAITING + 1).map(|_| UnixStream::pair().unwrap()).collect();
        let (ours, theirs): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        theirs.into_iter().for_each(|socket| board.put(7, socket.into()));
        assert_eq!(ours.iter().filter(|socket| is_hung_up(socket)).count(), 1);
    }
}
