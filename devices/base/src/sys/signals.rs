//! Signals as a file descriptor.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

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

/// Those of `signals` that this process was not told to ignore (`nohup`, `command &` in a script): a signal that is
/// ignored but blocked would come out of a descriptor all the same.
pub fn heeded(signals: &[i32]) -> Vec<i32> {
    let is_ignored = |signal: i32| {
        // SAFETY: all-zero is a valid `sigaction` to be filled in.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: nothing is set, and the pointer is to a local.
        unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
        action.sa_sigaction == libc::SIG_IGN
    };
    signals.iter().copied().filter(|signal| !is_ignored(*signal)).collect()
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

/// The number of the next signal that waits in a descriptor of [`divert`].
pub fn next(fd: impl AsFd) -> Option<i32> {
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
}
