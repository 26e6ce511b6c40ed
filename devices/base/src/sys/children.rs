//! Child processes that do not outlive their parent, however that ends.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Has the child killed when the thread that spawns it ends, also by `SIGKILL`: spawn it from one that waits for it.
pub fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    let ask = move || {
        // SAFETY: the request takes one number and touches no memory.
        let asked = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        if asked != 0 {
            return Err(io::Error::last_os_error());
        }
        // The parent may have died before it was asked for, and then no signal comes.
        if std::os::unix::process::parent_id() == parent {
            Ok(())
        } else {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    };
    // SAFETY: between fork and exec it makes two system calls and neither locks nor allocates.
    unsafe { command.pre_exec(ask) };
}

/// Has the child hear all signals, also those that its parent takes in another way ([`super::signals::divert`]).
pub fn hear_signals(command: &mut Command) {
    let unblock = || {
        // SAFETY: all-zero is a valid `sigset_t` to be emptied.
        let mut none: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is a local.
        unsafe { libc::sigemptyset(&raw mut none) };
        // SAFETY: the set is valid, the old mask is not asked for.
        match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) } {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    };
    // SAFETY: between fork and exec it makes one system call and neither locks nor allocates.
    unsafe { command.pre_exec(unblock) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    #[test]
    fn a_child_dies_with_the_thread_that_started_it() {
        let mut command = Command::new("sleep");
        command.arg("1000");
        die_with_parent(&mut command);
        let mut child = std::thread::spawn(move || command.spawn().unwrap()).join().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn a_child_hears_what_its_parent_has_blocked() {
        // In a thread of its own, so that the mask of the test runner stays as it is.
        std::thread::spawn(|| {
            super::super::signals::block(&[libc::SIGTERM]).unwrap();
            let mut command = Command::new("sh");
            command.args(["-c", "kill -TERM $$; exit 3"]);
            assert_eq!(command.status().unwrap().code(), Some(3), "without it the child is as deaf");
            hear_signals(&mut command);
            assert_eq!(command.status().unwrap().signal(), Some(libc::SIGTERM));
        })
        .join()
        .unwrap();
    }
}
