//! Parts of the host's kernel that work rings, and what helps where they are not to be had.

use std::io;

use base::fail::why_of;
use base::host::vhost::{Back, Vhost};
use base::memory::Memory;
use base::sys::vhost::Kernel;
use base::{Fail, Result};

/// Opens the one of that kind for `role`, whose guest has this memory.
///
/// # Errors
/// As the host answers, with the remedy.
pub fn open(role: &str, back: Back, memory: &Memory) -> Result<Box<dyn Vhost>> {
    match Kernel::open(back, memory) {
        Ok(kernel) => Ok(Box::new(kernel)),
        Err(cause) => {
            let hint = remedy(&cause, back);
            let fail = Fail::new(why_of(&cause), format!("open {} for {role}", back.path()));
            let fail = fail.because(cause);
            Err(if hint.is_empty() { fail } else { fail.hint(hint) })
        }
    }
}

fn remedy(cause: &io::Error, back: Back) -> String {
    let path = back.path();
    match cause.raw_os_error().unwrap_or(0) {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => {
            format!("load the driver: sudo modprobe {}; or pass vhost=off", back.module())
        }
        libc::EACCES | libc::EPERM => {
            format!("let this user open it: sudo setfacl -m u:$USER:rw {path}; or pass vhost=off")
        }
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_has_a_remedy() {
        let hint = |number, back| remedy(&io::Error::from_raw_os_error(number), back);
        assert!(hint(libc::ENOENT, Back::Net).contains("sudo modprobe vhost_net"));
        assert!(hint(libc::EACCES, Back::Vsock).contains("setfacl -m u:$USER:rw /dev/vhost-vsock"));
        assert_eq!(hint(libc::EMFILE, Back::Net), "");
    }
}
