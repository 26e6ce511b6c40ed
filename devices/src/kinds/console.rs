//! A console of few exits: virtio-console (virtio 1.2, section 5.3), `hvc0` in Linux. With a name it is no console but
//! a port for programs, `/dev/virtio-ports/NAME`.
//!
//! Each is a device of its own with one port. Output is taken from the guest as fast as the host takes it; where
//! there may be nobody to read it, what nobody reads is forgotten, the oldest first. Input is taken from the host
//! when the guest has room for it.

mod device;
mod line;
mod port;

use std::fs::File;
use std::path::PathBuf;

use base::host::{Door, Host};
use base::{Fail, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::device::Console;
use self::line::Line;
use self::port::Port;
use crate::catalog::{Body, Driver, Kind, Kit, Presence};
use crate::line_end::LineEnd;

/// Where a console leads: `to=...`, `file=...` or `socket=...`.
#[derive(Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// A place that is no file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<To>,
    /// A file for the output, emptied first. There is no input then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// A Unix socket that is made, and removed at the end; one program at a time is connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    /// Makes it a port of this name for programs of the guest, and no console.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

/// A place where a console may lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum To {
    /// Standard input and output; a terminal is set to raw mode, `Ctrl-a x` ends the run.
    Stdio,
    /// A new pseudo-terminal, whose name is printed. What nobody reads there is forgotten, the oldest first.
    Pty,
    /// Nowhere: output is thrown away and there is no input. A kernel's last words are heard all the same.
    None,
}

/// The longest name of a port.
const NAME_MAX: usize = 64;

/// The console.
pub struct This;

impl Kind for This {
    type Spec = Spec;
    const NAME: &'static str = "console";
    const FLAG: &'static str = "console";
    const SUMMARY: &'static str = "a console (virtio-console, hvc0), or a named port for programs: stdio, pty, none, file=PATH \
                                   or socket=PATH";
    const BARE: &'static str = "to";
    const EXAMPLE: &'static str = "pty";
    const PRESENCE: Presence = Presence::OnRequest;
    const DRIVERS: &'static [Driver] = &[Driver { module: "virtio_console", option: "VIRTIO_CONSOLE" }];

    fn check(spec: &Spec, name: &str) -> Result<()> {
        let refuse = |cause: String, hint: String| {
            Err(Fail::new(Why::Usage, format!("choose the end of {name}")).because(cause).hint(hint))
        };
        if spec.socket.is_some() && (spec.to.is_some() || spec.file.is_some()) {
            return refuse("socket and another one are given".to_owned(), "leave one of them out".to_owned());
        }
        match &spec.name {
            Some(port) if port.is_empty() || port.len() > NAME_MAX || !port.bytes().all(fits) => refuse(
                format!("a port cannot be named `{port}`"),
                format!("a name is 1 to {NAME_MAX} letters, digits, `.`, `-` and `_`"),
            ),
            _ => end_of(spec).check(name),
        }
    }

    fn claim(spec: &Spec, name: &str, host: &dyn Host) -> Result<Vec<File>> {
        if let Some(path) = &spec.socket {
            host.door(name, Door::Socket(path))?;
        }
        Ok(end_of(spec).claim(name, host)?.into_iter().collect())
    }

    fn terminal(spec: &Spec) -> Option<&'static str> {
        (spec.name.is_none() && !matches!(spec.to, Some(To::None))).then_some("hvc0")
    }

    fn build(spec: &Spec, kit: &Kit<'_>) -> Result<Body> {
        let line = match &spec.socket {
            Some(path) => Line::called(kit.host.listen(kit.name, path)?, spec.name.is_none()),
            None => Line::open(&end_of(spec), kit)?,
        };
        let screen = if line.is_terminal() { kit.host.screen() } else { None };
        let port = spec.name.as_ref().map(|name| Port::new(name));
        Ok(Body::Virtio(Box::new(Console::new(line, port, screen, kit))))
    }
}

fn fits(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b".-_".contains(&byte)
}

fn end_of(spec: &Spec) -> LineEnd<To> {
    LineEnd { to: spec.to, file: spec.file.clone() }
}
