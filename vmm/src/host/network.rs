//! Taps of the host, and room for as many sockets as a network has flows.

use std::io;

use base::fail::why_of;
use base::host::Tap;
use base::{Fail, Result};
use rustix::process::{Resource, getrlimit, setrlimit};

use crate::log;

/// Opens the tap called `name`, or makes one, for `role`.
///
/// # Errors
/// As the host answers, with the remedy.
pub fn tap(role: &str, name: Option<&str>, queues: usize) -> Result<Tap> {
    let tap = Tap::open(name.unwrap_or("mayfly%d"), queues).map_err(|cause| {
        let doing = match name {
            Some(name) => format!("open tap {name} for {role}"),
            None => format!("make a tap for {role}"),
        };
        let fail = Fail::new(why_of(&cause), doing);
        let hint = tap_remedy(&cause, name, queues);
        let fail = fail.because(cause);
        if hint.is_empty() { fail } else { fail.hint(hint) }
    })?;
    if name.is_none() {
        // Ours, so we may; without it not one frame would pass.
        if let Err(cause) = tap.bring_up() {
            log::note(&format!("bring {} up by hand: {cause}", tap.name));
        }
        log::tell(&format!("{role} is on {}", tap.name));
    }
    Ok(tap)
}

/// Raises the limit of open files by `count`, as far as this user may.
pub fn expect_descriptors(count: u64) {
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = limit.current.map(|now| now.saturating_add(count));
    limit.current = match (wanted, limit.maximum) {
        (Some(wanted), Some(most)) => Some(wanted.min(most)),
        (wanted, _) => wanted,
    };
    if let Err(cause) = setrlimit(Resource::Nofile, limit) {
        log::note(&format!("the limit of open files stays as it is: {cause}"));
    }
}

/// What helps when there is no tap.
fn tap_remedy(cause: &io::Error, name: Option<&str>, queues: usize) -> String {
    let shown = name.unwrap_or("tap0");
    let multi = if queues > 1 { " multi_queue" } else { "" };
    match cause.raw_os_error().unwrap_or(0) {
        libc::EPERM | libc::EACCES => format!(
            "have root make one: ip tuntap add {shown} mode tap{multi} user $USER && ip link set {shown} up, then pass \
             tap={shown}; or use `--net user`, which needs no rights"
        ),
        libc::ENOENT | libc::ENODEV | libc::ENXIO => {
            "load the driver: modprobe tun; or use `--net user`, which needs none".to_owned()
        }
        libc::EBUSY => "another program uses it: end that one first, or take another tap".to_owned(),
        libc::EINVAL if queues > 1 => {
            format!(
                "make it for several queues: ip tuntap add {shown} mode tap multi_queue, or pass queues=1"
            )
        }
        libc::EINVAL => "name a tap, not another interface; ip link shows them".to_owned(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_of_a_tap_has_a_remedy() {
        let hint = |number, name, queues| tap_remedy(&io::Error::from_raw_os_error(number), name, queues);
        assert!(
            hint(libc::EPERM, Some("tap7"), 1)
                .starts_with("have root make one: ip tuntap add tap7 mode tap user $USER")
        );
        assert!(hint(libc::EPERM, None, 2).contains("multi_queue"));
        assert!(hint(libc::ENOENT, None, 1).contains("modprobe tun"));
        assert!(hint(libc::EBUSY, Some("tap7"), 1).contains("another program"));
    }
}
