//! The emulated host as seen from here, before it boots: its files are those of this machine, its sockets are not.

use std::fs::File;
use std::io;
use std::path::{Path, absolute};

use base::host::{Access, Door, Host, Stream};
use base::{Fail, Result, Why};

use super::LinuxHost;
use crate::log;

/// Directories of the emulated host's own, in which sockets can be made.
const OWN: [&str; 2] = ["/run", "/dev/shm"];

/// A host for the claims of devices that will be built on the emulated host.
#[derive(Debug, Default)]
pub struct Elsewhere(LinuxHost);

impl Host for Elsewhere {
    fn open(&self, role: &str, path: &Path, access: Access) -> Result<File> {
        self.0.open(role, path, access)
    }

    fn could_make(&self, role: &str, path: &Path) -> Result<()> {
        self.0.could_make(role, path)
    }

    fn door(&self, role: &str, door: Door<'_>) -> Result<()> {
        let there = "on the emulated host reach the guest there, none on this machine";
        match door {
            Door::Ports(ports) => {
                let ports: Vec<_> = ports.iter().map(ToString::to_string).collect();
                log::note(&format!("{role}: programs {there} ({})", ports.join(", ")));
                Ok(())
            }
            Door::Socket(path) if is_own(path) => {
                log::note(&format!("{role}: programs {there} ({})", path.display()));
                Ok(())
            }
            Door::Socket(path) => {
                let name = path.file_name().unwrap_or_default().display();
                Err(Fail::new(Why::Unsupported, format!("listen for {role} on {}", path.display()))
                    .because("on the emulated host sockets can be made in its own /run and /dev/shm only")
                    .hint(format!(
                        "name it /run/{name}; only programs on that host reach it there (mayfly lab)"
                    )))
            }
            Door::Program(path) => {
                Err(Fail::new(Why::Unsupported, format!("connect {role} to {}", path.display()))
                    .because("programs of this machine cannot be reached from the emulated host")
                    .hint(format!(
                        "run both there: mayfly lab -- sh -c 'PROGRAM & mayfly run ...', with a socket in {}",
                        OWN.join(" or ")
                    )))
            }
        }
    }

    fn stdio(&self, role: &str) -> Result<Stream> {
        self.0.stdio(role)
    }

    fn pty(&self, role: &str) -> Result<Stream> {
        self.0.pty(role)
    }

    fn random(&self, data: &mut [u8]) -> io::Result<()> {
        self.0.random(data)
    }
}

/// Whether the directory of `path` is one of the emulated host's own. What else is below them, it does not have.
fn is_own(path: &Path) -> bool {
    let path = absolute(path).unwrap_or_default();
    // `/var/run` is `/run` by another name.
    let place = path.parent().map(|place| place.canonicalize().unwrap_or_else(|_| place.to_owned()));
    place.is_some_and(|place| OWN.iter().any(|own| place == Path::new(own)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_is_refused_where_the_emulated_host_cannot_make_it() {
        let host = Elsewhere::default();
        for good in ["/run/v.sock", "/dev/shm/v.sock", "/run/./v.sock"] {
            host.door("vsock0", Door::Socket(Path::new(good))).unwrap();
        }
        for bad in ["v.sock", "/tmp/v.sock", "/run/user/1000/v.sock", "/dev/v.sock"] {
            let told = host.door("vsock0", Door::Socket(Path::new(bad))).unwrap_err().to_string();
            assert!(
                told.starts_with(&format!("listen for vsock0 on {bad}: on the emulated host ")),
                "{told}"
            );
            assert!(told.contains("\n  hint: name it /run/v.sock; "), "{told}");
        }
        let program = host.door("net0", Door::Program(Path::new("/tmp/p"))).unwrap_err();
        assert!(program.to_string().starts_with("connect net0 to /tmp/p: "), "{program}");
    }
}
