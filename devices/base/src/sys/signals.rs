//! Signals as a file descriptor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// Blocks `signals` in the calling thread and those it starts from now on.
///
/// # Errors
/// A number is no signal.
pub fn block(signals: &[i32]) -> io::Result<()> {
    let set = set_of(signals);
    // SAFETY: the set is valid, the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// Lets `signals` through in the calling thread again.
pub fn unblock(signals: &[i32]) {
    let set = set_of(signals);
    // SAFETY: the set is valid, the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Whether this process was told to ignore `signal` (`nohup`, `command &` in a script).
fn is_ignored(signal: i32) -> bool {
    // SAFETY: all-zero is a valid `sigaction` to be filled in.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is set, and the pointer is to a local.
    unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    action.sa_sigaction == libc::SIG_IGN
}

/// Has a file that grows beyond the limit of this process (`ulimit -f`) answer with an error, and not with a signal
/// that ends the process.
pub fn prefer_errors() {
    // SAFETY: no handler is set.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: all-zero is a valid `sigset_t` to be emptied.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is a local.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in signals {
        // SAFETY: the set is a local; a number that is no signal is refused.
        unsafe { libc::sigaddset(&raw mut set, *signal) };
    }
    set
}

/// Blocks `signals` as [`block`] does; they come out of the descriptor instead (`signalfd(2)`).
///
/// # Errors
/// The host is out of file descriptors.
pub fn divert(signals: &[i32]) -> io::Result<OwnedFd> {
    block(signals)?;
    let set = set_of(signals);
    // SAFETY: the set is valid, -1 asks for a new descriptor.
    let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The number of the next signal that waits in a descriptor of [`divert`] and that this process was not told to ignore:
/// one that is ignored but blocked comes out of the descriptor all the same.
pub fn next(fd: impl AsFd) -> Option<i32> {
    loop {
        let signal = take(fd.as_fd())?;
        if !is_ignored(signal) {
            return Some(signal);
        }
    }
}

fn take(fd: BorrowedFd<'_>) -> Option<i32> {
    let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
    let n = rustix::io::read(fd, &mut info).ok()?;
    // `ssi_signo` is the first field (signalfd(2)).
    let number = info.first_chunk::<4>().filter(|_| n == info.len())?;
    i32::try_from(u32::from_ne_bytes(*number)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_signal_comes_out_of_the_descriptor() {
        // In a thread of its own, so that the mask of the test runner stays as it is.
        std::thread::spawn(|| {
            let fd = divert(&[libc::SIGUSR2]).unwrap();
            assert_eq!(next(&fd), None);
            // SAFETY: the thread is this one, and the signal is blocked.
            unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGUSR2) };
            assert_eq!(next(&fd), Some(libc::SIGUSR2));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn an_ignored_signal_does_not_come_out() {
        // In a thread of its own, so that the mask of the test runner stays as it is.
        std::thread::spawn(|| {
            let fd = divert(&[libc::SIGPWR, libc::SIGWINCH]).unwrap();
            // SAFETY: no handler is set; no other test uses this signal.
            unsafe { libc::signal(libc::SIGPWR, libc::SIG_IGN) };
            for signal in [libc::SIGPWR, libc::SIGWINCH] {
                // SAFETY: the thread is this one, and the signal is blocked.
                unsafe { libc::pthread_kill(libc::pthread_self(), signal) };
            }
            assert_eq!(next(&fd), Some(libc::SIGWINCH));
            assert_eq!(next(&fd), None);
        })
        .join()
        .unwrap();
    }
}
