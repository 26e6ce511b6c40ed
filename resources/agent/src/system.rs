//! A system in the guest: the root's own systemd is process 1, and the agent one of its services, put where systemd looks for
//! units beside those of the root, which stays as it is.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use agent::orders::Orders;

/// Where systemd is, in the order of looking.
const INITS: [&str; 4] = ["/usr/lib/systemd/systemd", "/lib/systemd/systemd", "/usr/sbin/init", "/sbin/init"];
/// Units that are gone with the run.
const UNITS: &str = "/run/systemd/system";
/// The agent's own file.
const AGENT: &str = "/run/mayfly-guest/agent";

/// First arguments of the agent as a service: the port to call follows, and what to say of a system that is not well.
pub const SERVE: &str = "serve";
pub const TROUBLE: &str = "trouble";

/// Becomes the systemd of the root. Returns only if that cannot be.
pub fn become_init(orders: &Orders) -> io::Error {
    let Some(init) = INITS.into_iter().find(|path| Path::new(path).exists()) else {
        return io::Error::new(ErrorKind::NotFound, "start systemd: the root has none");
    };
    match install(orders.port) {
        Ok(()) => Command::new(init).env_clear().exec(),
        Err(error) => io::Error::new(error.kind(), format!("put the agent into the system: {error}")),
    }
}

/// Puts the agent and its units where they will be found.
fn install(port: u32) -> io::Result<()> {
    fs::create_dir_all("/run/mayfly-guest")?;
    fs::copy("/proc/self/exe", AGENT)?;
    fs::set_permissions(AGENT, PermissionsExt::from_mode(0o755))?;
    fs::create_dir_all(UNITS)?;
    for (name, text, targets) in units(port) {
        let path = format!("{UNITS}/{name}");
        fs::write(&path, text)?;
        for target in targets {
            let wants = format!("{UNITS}/{target}.wants");
            fs::create_dir_all(&wants)?;
            symlink(&path, format!("{wants}/{name}"))?;
        }
    }
    Ok(())
}

/// Names and texts of units, and the targets that want them: the command when the system is up, and a word to the host when it does
/// not come up.
fn units(port: u32) -> [(&'static str, String, &'static [&'static str]); 2] {
    let service = format!(
        "[Unit]\nDescription=The command of mayfly\nAfter=multi-user.target\n\
         [Service]\nExecStart={AGENT} {SERVE} {port}\nStandardOutput=null\nStandardError=kmsg\nDelegate=yes\n\
         TasksMax=infinity\nLimitNOFILE=infinity\nOOMPolicy=continue\nKillMode=mixed\nTimeoutStopSec=5\n"
    );
    let trouble = format!(
        "[Unit]\nDescription=A word to mayfly\nDefaultDependencies=no\n\
         [Service]\nType=oneshot\nExecStart={AGENT} {TROUBLE} {port} \"the system came up in rescue or emergency mode\"\n"
    );
    [
        ("mayfly.service", service, &["multi-user.target"]),
        ("mayfly-trouble.service", trouble, &["emergency.target", "rescue.target"]),
    ]
}

/// Has the system end in good order, or the machine where there is nobody to ask.
pub fn power_off() -> io::Result<()> {
    rustix::fs::sync();
    let asked = Command::new("systemctl").args(["--no-block", "poweroff"]).status();
    match asked {
        Ok(status) if status.success() => Ok(()),
        _ => crate::init::end("poweroff", ""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_name_the_agent_and_its_port() {
        let [(name, service, wanted), (_, trouble, _)] = units(7);
        assert_eq!((name, wanted), ("mayfly.service", &["multi-user.target"][..]));
        assert!(service.contains("\nExecStart=/run/mayfly-guest/agent serve 7\n"), "{service}");
        assert!(trouble.contains("\nExecStart=/run/mayfly-guest/agent trouble 7 \"the system"), "{trouble}");
        assert!([service, trouble].iter().all(|text| text.lines().all(|line| !line.starts_with(' '))));
    }
}
