//! The one list of devices, and how each reader sees an entry of it.
//!
//! Command line, help, plan file, JSON schema, assembly and contract tests are all readings of [`CATALOG`]: a new
//! device is one file in `kinds` and one line here.

use std::fs::File;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base::bus::{Effect, Registers};
use base::clock::Clock;
use base::host::Host;
use base::irq::SharedLine;
use base::lane::LaneHandle;
use base::memory::Memory;
use base::node::Node;
use base::{Fail, Result, Why};
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::flag::{self, Form};
use crate::virtio::Device;

/// How many of a kind a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// Always one; the flag changes how it is made. The text is the `Spec` it has without a flag.
    Standard(&'static str),
    /// None unless asked for, then one for each flag.
    OnRequest,
}

/// A part of Linux that may be a module of its own; what that depends on, it says itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Driver {
    /// The name of the module.
    pub module: &'static str,
    /// The option of the kernel's configuration, without its `CONFIG_`.
    pub option: &'static str,
}

/// What mayfly itself may need a device for, to run a command in a guest.
#[derive(Clone, Copy, Debug)]
pub enum Purpose<'a> {
    /// The guest calls this process.
    Calls,
    /// A console that leaves the standard streams to others.
    Console,
    /// The guest finds a disk with this serial number. What it writes to the image is kept, or thrown away.
    Disk {
        /// The image.
        image: &'a Path,
        /// The serial number.
        serial: &'a str,
        /// Writes are kept.
        keep: bool,
    },
    /// The guest finds a directory of the host by this tag.
    Directory {
        /// The directory.
        path: &'a Path,
        /// The tag.
        tag: &'a str,
        /// What it may do with it.
        access: Access,
    },
}

/// What a guest may do with a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Read it, and lay a layer of its own over it.
    Layered,
    /// Write to it as well.
    Through,
}

/// A network interface as a guest with a command is to find it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its Ethernet address; `None` if that is known only when it is built.
    pub mac: Option<[u8; 6]>,
    /// Its addresses, each with the length of its network's prefix.
    pub addresses: Vec<(IpAddr, u8)>,
    /// The ways to everywhere else.
    pub gateways: Vec<IpAddr>,
    /// Servers that know names.
    pub servers: Vec<IpAddr>,
}

/// What a device author writes: the whole of a device, in one file.
pub trait Kind: Send + Sync + 'static {
    /// What the user can say about it. Doc comments become help; unknown keys are refused.
    type Spec: Serialize + DeserializeOwned + JsonSchema;
    /// Its name: file, plan key, counters (`blk`).
    const NAME: &'static str;
    /// Its flag on the command line, without dashes (`disk`).
    const FLAG: &'static str;
    /// One sentence for `--help`.
    const SUMMARY: &'static str;
    /// The key that a bare first value stands for: `--disk a.img` is `--disk path=a.img`.
    const BARE: &'static str;
    /// A working value of the flag, for help and for the contract tests (on the fake host).
    const EXAMPLE: &'static str;
    /// How many there are.
    const PRESENCE: Presence;
    /// Where Linux has its driver.
    const DRIVERS: &'static [Driver] = &[];

    /// Sees to it that the settings of the device `name` make sense together. It asks no host: whoever writes a plan
    /// hears of it, and [`Entry::build`] has done it before [`Kind::build`].
    ///
    /// # Errors
    /// [`Why::Usage`]: they do not.
    fn check(spec: &Self::Spec, name: &str) -> Result<()> {
        let _ = (spec, name);
        Ok(())
    }

    /// Opens the files of the host that the device `name` would use, and locks them as [`Kind::build`] does; tells the
    /// host of its doors ([`Host::door`]).
    ///
    /// For a process that hands the machine to a host whose locks do not reach ours: it finds out early what is wrong
    /// with the files, and holds them meanwhile. No disk is made.
    ///
    /// # Errors
    /// Those of [`Kind::build`] that are about these files.
    fn claim(spec: &Self::Spec, name: &str, host: &dyn Host) -> Result<Vec<File>> {
        let _ = (spec, name, host);
        Ok(Vec::new())
    }

    /// The name that Linux has for it as a console, if what is printed there is to be seen: `ttyS0`.
    fn terminal(spec: &Self::Spec) -> Option<&'static str> {
        let _ = spec;
        None
    }

    /// The network interface that the device `name` is, if its addresses are known.
    ///
    /// # Errors
    /// As [`Kind::check`].
    fn interface(spec: &Self::Spec, name: &str) -> Result<Option<Interface>> {
        let _ = (spec, name);
        Ok(None)
    }

    /// Settings with which it serves a purpose of mayfly's own, if it can.
    fn serve(purpose: Purpose<'_>) -> Option<Self::Spec> {
        let _ = purpose;
        None
    }

    /// Whether one that the operator has made like this does for such a purpose what [`Kind::serve`] would make one for.
    fn does_serve(spec: &Self::Spec, purpose: Purpose<'_>) -> bool {
        let _ = (spec, purpose);
        true
    }

    /// Builds it.
    ///
    /// # Errors
    /// The host lacks what it needs, or the values of the `Spec` make no sense together.
    fn build(spec: &Self::Spec, kit: &Kit<'_>) -> Result<Body>;
}

/// What a device may take from the machine it is built for.
pub struct Kit<'a> {
    /// The name of this one: `disk0`, `serial`. In messages and counters.
    pub name: &'a str,
    /// The host's files, streams and randomness.
    pub host: &'a dyn Host,
    /// The times.
    pub clock: Arc<dyn Clock>,
    /// Guest memory.
    pub memory: &'a Memory,
    /// Interrupt lines by GSI number.
    pub lines: &'a dyn Fn(u32) -> SharedLine,
    /// Told what the guest prints on a console that is no chip's: a kernel's last words may be among it.
    pub overhear: Overhear,
    /// The lane on which slow or waiting work of chips lives (standard input). Virtio devices get their own
    /// from the transport.
    pub lane: &'a LaneHandle,
}

/// Listens to a console.
pub type Overhear = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// What [`Kind::build`] gives.
pub enum Body {
    /// A chip at fixed addresses.
    Chip(Chip),
    /// A virtio device, to be put behind a transport.
    Virtio(Box<dyn Device>),
    /// Nothing: the user turned it off (`--serial none`).
    Absent,
}

/// A chip at fixed addresses: its register windows and how the firmware tables name it.
#[derive(Default)]
pub struct Chip {
    /// Register windows.
    pub windows: Vec<Window>,
    /// Its entry in the firmware tables, if the guest is to find it there.
    pub node: Option<Node>,
    /// The port on which console text leaves byte by byte: watched for a kernel's last words.
    pub console: Option<u64>,
    /// To be called once when the last vCPU has stopped: hands over to the host what the guest has written.
    pub finish: Option<Finish>,
}

/// The last duty of a chip. It waits as long as the host keeps taking something within each span of this length, and
/// says what a loss of output, now or before, means for the run.
///
/// # Errors
/// The host has not taken all in time: says how much is lost.
pub type Finish = Box<dyn FnOnce(Duration) -> Result<Effect> + Send>;

/// The address space of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// I/O ports.
    Port,
    /// Guest-physical memory addresses.
    Memory,
}

/// Registers at an address.
pub struct Window {
    /// Which space.
    pub space: Space,
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
    /// Registers in it whose writes may be handed over late and in batches.
    pub lazy: &'static [Lazy],
    /// Who answers.
    pub registers: Box<dyn Registers>,
}

/// A 1-byte register on which nothing depends but the order of its writes and the accesses that follow: a
/// transmitter, an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lazy {
    /// Its address.
    pub address: u64,
    /// That holds for this value only; any other has to be heard at once.
    pub only: Option<u8>,
}

/// A kind as the readers of the list see it: without its types.
pub trait Entry: Sync {
    /// See [`Kind::NAME`].
    fn name(&self) -> &'static str;
    /// See [`Kind::FLAG`].
    fn flag(&self) -> &'static str;
    /// See [`Kind::SUMMARY`].
    fn summary(&self) -> &'static str;
    /// See [`Kind::EXAMPLE`].
    fn example(&self) -> &'static str;
    /// See [`Kind::PRESENCE`].
    fn presence(&self) -> Presence;
    /// The keys of its `Spec`, in the order in which they are declared; other names of a key are among them.
    fn keys(&self) -> &'static [&'static str];
    /// The JSON schema of its `Spec`, with the doc comments as descriptions.
    fn schema(&self) -> schemars::Schema;
    /// Reads `key=value,key=value` into the JSON form of the `Spec`, all defaults filled in; `,,` is a comma within a
    /// value. A key whose value is a list may be repeated.
    ///
    /// # Errors
    /// [`Why::Usage`]: an unknown key (the known ones are named), a missing or a bad value.
    fn parse(&self, text: &str) -> Result<Value>;
    /// Checks the JSON form of the `Spec` of the device `name` and fills in its defaults.
    ///
    /// # Errors
    /// As [`Entry::parse`] and [`Kind::check`].
    fn check(&self, spec: &Value, name: &str) -> Result<Value>;
    /// Opens and locks the files that one would use.
    ///
    /// # Errors
    /// As [`Kind::claim`].
    fn claim(&self, spec: &Value, name: &str, host: &dyn Host) -> Result<Vec<File>>;
    /// See [`Kind::terminal`]; `None` also for a spec that is none.
    fn terminal(&self, spec: &Value) -> Option<&'static str>;
    /// See [`Kind::interface`].
    ///
    /// # Errors
    /// As [`Kind::check`].
    fn interface(&self, spec: &Value, name: &str) -> Result<Option<Interface>>;
    /// See [`Kind::DRIVERS`].
    fn drivers(&self) -> &'static [Driver];
    /// See [`Kind::serve`].
    ///
    /// # Errors
    /// The settings cannot be written down.
    fn serve(&self, purpose: Purpose<'_>) -> Result<Option<Value>>;
    /// As [`Kind::does_serve`].
    ///
    /// # Errors
    /// The settings are none of its kind.
    fn does_serve(&self, spec: &Value, purpose: Purpose<'_>) -> Result<bool>;
    /// Builds one.
    ///
    /// # Errors
    /// As [`Kind::check`] and [`Kind::build`].
    fn build(&self, spec: &Value, kit: &Kit<'_>) -> Result<Body>;
}

/// A [`Kind`] seen as an [`Entry`].
pub struct Of<K>(PhantomData<fn() -> K>);

impl<K: Kind> Of<K> {
    /// The entry for `K`.
    pub const NEW: Self = Of(PhantomData);
    const FORM: Form = Form { flag: K::FLAG, bare: K::BARE, example: K::EXAMPLE };

    fn typed(spec: &Value) -> Result<K::Spec> {
        serde_json::from_value(spec.clone()).map_err(|cause| {
            Fail::new(Why::Usage, format!("read the {} settings", K::NAME))
                .because(cause)
                .hint(Self::FORM.hint())
        })
    }

    fn value(spec: &K::Spec) -> Result<Value> {
        serde_json::to_value(spec)
            .map_err(|cause| Fail::new(Why::Usage, format!("write the {} settings", K::NAME)).because(cause))
    }
}

impl<K: Kind> Entry for Of<K> {
    fn name(&self) -> &'static str {
        K::NAME
    }
    fn flag(&self) -> &'static str {
        K::FLAG
    }
    fn summary(&self) -> &'static str {
        K::SUMMARY
    }
    fn example(&self) -> &'static str {
        K::EXAMPLE
    }
    fn presence(&self) -> Presence {
        K::PRESENCE
    }
    fn keys(&self) -> &'static [&'static str] {
        flag::keys::<K::Spec>()
    }
    fn schema(&self) -> schemars::Schema {
        schemars::schema_for!(K::Spec)
    }
    fn parse(&self, text: &str) -> Result<Value> {
        let spec: K::Spec = flag::parse(&Self::FORM, text)?;
        Self::value(&spec)
    }
    fn check(&self, spec: &Value, name: &str) -> Result<Value> {
        let spec = Self::typed(spec)?;
        K::check(&spec, name)?;
        Self::value(&spec)
    }
    fn claim(&self, spec: &Value, name: &str, host: &dyn Host) -> Result<Vec<File>> {
        K::claim(&Self::typed(spec)?, name, host)
    }
    fn terminal(&self, spec: &Value) -> Option<&'static str> {
        K::terminal(&Self::typed(spec).ok()?)
    }
    fn interface(&self, spec: &Value, name: &str) -> Result<Option<Interface>> {
        K::interface(&Self::typed(spec)?, name)
    }
    fn drivers(&self) -> &'static [Driver] {
        K::DRIVERS
    }
    fn serve(&self, purpose: Purpose<'_>) -> Result<Option<Value>> {
        K::serve(purpose).as_ref().map(Self::value).transpose()
    }
    fn does_serve(&self, spec: &Value, purpose: Purpose<'_>) -> Result<bool> {
        Self::typed(spec).map(|spec| K::does_serve(&spec, purpose))
    }
    fn build(&self, spec: &Value, kit: &Kit<'_>) -> Result<Body> {
        let spec = Self::typed(spec)?;
        K::check(&spec, kit.name)?;
        K::build(&spec, kit)
    }
}

/// Makes the list: `catalog! { rng, blk }` stands for `kinds::rng::Rng`-like `kinds::NAME::This`.
macro_rules! catalog {
    ($($name:ident)*) => {
        /// Every device there is.
        pub static CATALOG: &[&dyn Entry] = &[$(&Of::<crate::kinds::$name::This>::NEW),*];
    };
}

catalog! { rng balloon blk virtiofs net vsock serial console i8042 rtc debugcon debugexit pvpanic power }

/// The entry called `name`.
pub fn find(name: &str) -> Option<&'static dyn Entry> {
    CATALOG.iter().copied().find(|entry| entry.name() == name)
}
