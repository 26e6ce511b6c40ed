//! Shares of the standard streams on which nobody waits.
//!
//! Whether a descriptor blocks belongs to the open file, which other programs share: to change it would change it for
//! them. So a pipe or a terminal is opened once more. Anything else, or one that cannot be opened, is shared as it is,
//! and its readers and writers take care ([`devices::inlet`], [`devices::outlet`]).

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fstat};
use rustix::stdio::{stdin, stdout};
use rustix::termios::isatty;

/// A share of standard output.
///
/// # Errors
/// The process is out of descriptors.
pub fn output() -> io::Result<OwnedFd> {
    share(stdout(), OFlags::WRONLY).map(|(fd, _)| fd)
}

/// A share of standard input, and whether it is a terminal.
///
/// # Errors
/// It is closed (`<&-`), or the process is out of descriptors.
pub fn input() -> io::Result<(OwnedFd, bool)> {
    share(stdin(), OFlags::RDONLY)
}

/// A share of `fd`, and whether it is a terminal.
fn share(fd: impl AsFd, direction: OFlags) -> io::Result<(OwnedFd, bool)> {
    let fd = fd.as_fd();
    let stat = fstat(fd)?;
    let kind = FileType::from_raw_mode(stat.st_mode);
    let terminal = kind == FileType::CharacterDevice && isatty(fd);
    // Opening the multiplexer of pseudo-terminals would make a new one.
    if kind == FileType::Fifo || (terminal && stat.st_rdev != rustix::fs::makedev(5, 2)) {
        let flags = direction | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        if let Ok(own) = rustix::fs::open(path, flags, Mode::empty()) {
            return Ok((own, terminal));
        }
    }
    Ok((fd.try_clone_to_owned()?, terminal))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fcntl_getfl;
    use rustix::pipe::pipe;

    #[test]
    fn our_share_of_a_pipe_does_not_block_and_the_others_still_do() {
        let (from, to) = pipe().unwrap();
        let (input, _) = share(&from, OFlags::RDONLY).unwrap();
        let (output, _) = share(&to, OFlags::WRONLY).unwrap();
        for (own, others) in [(&input, &from), (&output, &to)] {
            assert!(fcntl_getfl(own).unwrap().contains(OFlags::NONBLOCK));
            assert!(!fcntl_getfl(others).unwrap().contains(OFlags::NONBLOCK));
        }
        assert_eq!(rustix::io::read(&input, &mut [0; 4]), Err(rustix::io::Errno::AGAIN));
        rustix::io::write(&output, b"x").unwrap();
        assert_eq!(rustix::io::read(&from, &mut [0; 4]).unwrap(), 1, "it is the same pipe");
    }

    #[test]
    fn our_share_of_a_terminal_does_not_block_either() {
        let (_master, terminal, _) = super::super::open_pty().unwrap();
        let (input, is_terminal) = share(&terminal, OFlags::RDONLY).unwrap();
        assert!(is_terminal);
        assert_eq!(rustix::io::read(&input, &mut [0; 4]), Err(rustix::io::Errno::AGAIN));
    }

    #[test]
    fn our_share_of_a_file_goes_on_where_the_others_are() {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, b"before").unwrap();
        rustix::io::write(share(&file, OFlags::WRONLY).unwrap().0, b", after").unwrap();
        assert_eq!(file.metadata().unwrap().len(), 13);
    }
}
