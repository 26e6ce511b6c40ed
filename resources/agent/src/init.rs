//! Process 1 of a guest: the kernel's file systems, its modules, what the command line asks for, and the end.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use rustix::system::{RebootCommand, reboot};

use crate::mounts::mount_at;
use crate::{checks, host, session};

/// The words of the kernel command line that begin with `mayfly.`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// `mayfly.mode=host`: be the emulated host; otherwise say hello.
    pub host: bool,
    /// `mayfly.do=CHECK[:ARGUMENT],...`: what to try out, in order.
    pub checks: Vec<(String, String)>,
    /// `mayfly.then=END[:ARGUMENT]`: how to end, if not by powering off.
    pub then: Option<(String, String)>,
}

impl Orders {
    /// Reads a kernel command line.
    pub fn parse(line: &str) -> Orders {
        let mut orders = Orders::default();
        let pair = |word: &str| {
            let (name, argument) = word.split_once(':').unwrap_or((word, ""));
            (name.to_owned(), argument.to_owned())
        };
        for word in line.split_ascii_whitespace() {
            match word.split_once('=') {
                Some(("mayfly.mode", mode)) => orders.host = mode == "host",
                Some(("mayfly.do", list)) => orders.checks.extend(list.split(',').map(pair)),
                Some(("mayfly.then", end)) => orders.then = Some(pair(end)),
                _ => {}
            }
        }
        orders
    }
}

/// Runs the guest to its end.
pub fn run() -> io::Result<()> {
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount_at(kind, kind, place, "")?;
    }
    let orders = Orders::parse(&fs::read_to_string("/proc/cmdline")?);
    // KVM keeps what it finds the clock to be when it is loaded.
    let (kvm, others): (Vec<_>, Vec<_>) = modules()?.into_iter().partition(|name| name.contains("kvm"));
    load(&others);
    if orders.host {
        host::await_clock()?;
    }
    load(&kvm);
    if orders.host {
        host::run()?;
        return end("poweroff", "");
    }
    if let Some(orders) = session::orders()? {
        // Loaded, and in nobody's way in a root that is this RAM disk.
        let _ = fs::remove_dir_all("/modules");
        session::run(&orders)?;
        return end("poweroff", "");
    }
    checks::hello();
    for (check, argument) in &orders.checks {
        checks::run(check, argument);
    }
    match &orders.then {
        Some((how, argument)) => end(how, argument),
        None => end("poweroff", ""),
    }
}

/// File names of the modules to be loaded, in order: those that `/modules/order` lists, one a line.
fn modules() -> io::Result<Vec<String>> {
    match fs::read_to_string("/modules/order") {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        result => Ok(result?.lines().map(str::to_owned).collect()),
    }
}

fn load(modules: &[String]) {
    for name in modules {
        let loaded = File::open(format!("/modules/{name}"))
            .and_then(|file| Ok(rustix::system::finit_module(file, c"", 0)?));
        if let Err(error) = loaded {
            // Not the end: a module without its hardware refuses to load, and what needs it says so itself.
            eprintln!("load module {name}: {error}");
        }
    }
}

/// Ends the guest in the way that is called `how`.
pub fn end(how: &str, argument: &str) -> io::Result<()> {
    rustix::fs::sync();
    match how {
        "reboot" => reboot(RebootCommand::Restart)?,
        "halt" => reboot(RebootCommand::Halt)?,
        "panic" => fs::write("/proc/sysrq-trigger", "c")?,
        // The debug-exit port: the run ends with this value as its exit code.
        "exit" => File::options().write(true).open("/dev/port")?.write_all_at(
            &[argument
                .parse()
                .map_err(|_| io::Error::new(ErrorKind::InvalidInput, "exit: give a number"))?],
            0xf4,
        )?,
        "return" => return Ok(()),
        "hang" => loop {
            std::thread::park();
        },
        _ => reboot(RebootCommand::PowerOff)?,
    }
    // Still here: the machine takes a moment, or does not obey. Returning from process 1 would be a panic.
    loop {
        std::thread::park();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_found_among_the_kernels_own_words() {
        let line = "console=ttyS0 mayfly.do=cpus,disk:vdb mayfly.do=clock mayfly.then=exit:7 quiet\n";
        let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
        let checks = vec![pair("cpus", ""), pair("disk", "vdb"), pair("clock", "")];
        assert_eq!(Orders::parse(line), Orders { host: false, checks, then: Some(pair("exit", "7")) });
        assert!(Orders::parse("mayfly.mode=host").host);
        assert_eq!(Orders::parse("mayfly root=/dev/vda"), Orders::default());
    }
}
