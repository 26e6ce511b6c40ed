//! The command of a plan: what runs in the guest, over which root, and what it needs of the machine for that.

use std::path::{Path, PathBuf};

use agent::orders::{self, FileSystem, ON_DISKS, Orders, Source, Writes};
use base::{Doing, Fail, Result, Why};
use devices::catalog::{self, CATALOG, Driver, Entry, Presence, Purpose};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Container, Device, Initrd, Ktap, Plan};

/// The port of the host's at which this process answers its agent: `mayf`, so that nobody else wants it.
pub const PORT: u32 = u32::from_be_bytes(*b"mayf");
/// The device that carries the guest's calls, and the one that has its root.
const CALLS: &str = "agent";
const ROOT: &str = "root";

/// The file system that keeps private what is written over another.
const OVERLAY: Driver = Driver { module: "overlay", option: "OVERLAY_FS" };
/// The file system that container images are unpacked into.
const UNPACKED: Driver = Driver { module: "ext4", option: "EXT4_FS" };
/// Where programs are looked for, unless the plan says it.
pub(super) const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that runs in the guest; the run ends with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Command {
    /// The program, found by the `PATH` of its environment, and its arguments. Without any, the guest waits for `mayfly exec`.
    pub argv: Vec<String>,
    /// Its environment: `NAME=VALUE`.
    pub env: Vec<String>,
    /// The directory it starts in; `/` if it is empty, or what its container image says.
    pub workdir: PathBuf,
    /// `USER[:GROUP]`, names of the guest or numbers; root if it is empty.
    pub user: String,
    /// It has a terminal: standard error is one with standard output.
    pub terminal: bool,
    /// The name of the machine.
    pub hostname: String,
    /// Its root file system.
    pub root: Root,
    /// Directories of the host in places of its own.
    pub volumes: Vec<Volume>,
    /// The systemd of the root is started first, and the command when it is up, as a service of it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub systemd: bool,
    /// Texts in complaints of the kernel's that are expected.
    pub allow: Vec<String>,
    /// What results of tests are good for.
    pub ktap: Ktap,
    /// A file that gets what was changed of the root: a tar archive, a layer of an image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub export_changes: Option<PathBuf>,
}

impl Default for Command {
    fn default() -> Self {
        Command {
            argv: Vec::new(),
            env: vec![PATH.to_owned()],
            workdir: PathBuf::new(),
            user: String::new(),
            terminal: false,
            hostname: "mayfly".to_owned(),
            root: Root::default(),
            volumes: Vec::new(),
            systemd: false,
            allow: Vec::new(),
            ktap: Ktap::default(),
            export_changes: None,
        }
    }
}

/// The root file system of a command.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Root {
    /// What the initial RAM disks hold.
    #[default]
    Initrd,
    /// A directory of the host, which is only read. What the guest writes stays in its memory, and goes with it.
    Directory(PathBuf),
    /// The file system in a disk image. What the guest writes is thrown away.
    Image(PathBuf),
    /// A container image. What the guest writes is thrown away. What the plan leaves out of the command, the image says.
    Container(Container),
}

/// A directory of the host in the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// The directory.
    pub host: PathBuf,
    /// Its place in the guest: an absolute path, made if it is missing.
    pub guest: PathBuf,
    /// What becomes of writes.
    #[serde(default)]
    pub access: Access,
}

/// What becomes of writes to a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// They are refused.
    Ro,
    /// They go through.
    #[default]
    Rw,
    /// They stay in the guest's memory, and go with it.
    Cow,
}

impl Volume {
    /// Reads `HOST:GUEST[:ro|rw|cow]`, or one path that means both.
    ///
    /// # Errors
    /// [`Why::Usage`]: it is none.
    pub fn parse(text: &str) -> Result<Volume> {
        let (paths, access) = match text.rsplit_once(':') {
            Some((paths, "ro")) => (paths, Access::Ro),
            Some((paths, "rw")) => (paths, Access::Rw),
            Some((paths, "cow")) => (paths, Access::Cow),
            _ => (text, Access::Rw),
        };
        let doing = || format!("use --volume {text}");
        let (host, guest) = paths.split_once(':').unwrap_or((paths, ""));
        let host = std::path::absolute(host).doing(Why::Usage, doing)?;
        let guest = if guest.is_empty() { host.clone() } else { guest.into() };
        if !guest.is_absolute() {
            return Err(Fail::new(Why::Usage, doing())
                .because("its place in the guest is no absolute path")
                .hint("an example: --volume src:/src:ro"));
        }
        Ok(Volume { host, guest, access })
    }
}

impl Command {
    /// Sees to it that it makes sense.
    ///
    /// # Errors
    /// [`Why::Usage`]: it does not.
    pub(super) fn check(&self) -> Result<()> {
        let usage = |doing: String, cause: &str, hint: &str| {
            Err(Fail::new(Why::Usage, doing).because(cause.to_owned()).hint(hint))
        };
        if let (Root::Container(container), true) = (&self.root, self.argv.is_empty()) {
            let doing = format!("run image {}", container.image);
            let hint = "say what to run: -- COMMAND ARGUMENT...";
            return usage(doing, "it has neither an entrypoint nor a command, and none was given", hint);
        }
        if self.argv.first().is_some_and(String::is_empty) {
            let hint = "say what to run: -- COMMAND ARGUMENT..., or `argv` of `command` in a plan";
            return usage("run a command in the guest".to_owned(), "it has no name", hint);
        }
        if let Some(word) =
            self.env.iter().find(|word| word.split_once('=').is_none_or(|(name, _)| name.is_empty()))
        {
            let hint = "an example: LANG=C.UTF-8";
            return usage(format!("set `{word}` in the environment"), "it is not NAME=VALUE", hint);
        }
        if !self.workdir.as_os_str().is_empty() && !self.workdir.is_absolute() {
            let doing = format!("start in `{}`", self.workdir.display());
            return usage(
                doing,
                "it is no absolute path",
                "the directory is one of the guest: /tmp, for example",
            );
        }
        if self.export_changes.is_some() && self.root == Root::Initrd {
            let hint = "pass --root DIR or --root IMAGE";
            return usage("export changes".to_owned(), "initial RAM disks are no root that has any", hint);
        }
        if self.systemd && self.root == Root::Initrd {
            let hint = "pass --root DIR or --root IMAGE";
            return usage("start systemd".to_owned(), "initial RAM disks are no root that has it", hint);
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
        if self.hostname.is_empty() || self.hostname.len() > 64 || !self.hostname.chars().all(fits) {
            return usage(
                format!("call the guest `{}`", self.hostname),
                "a name is 1 to 64 letters, digits, `-` and `.`",
                "leave it out for `mayfly`",
            );
        }
        Ok(())
    }

    /// What the agent is told to do before it can be asked for the command.
    pub fn orders(&self) -> Orders {
        let volume = |source, place: &Path, writes| {
            let place = place.as_os_str().as_encoded_bytes().to_vec();
            orders::Volume { source, place, writes }
        };
        let top = Path::new("/");
        let root = match &self.root {
            Root::Initrd => None,
            Root::Directory(_) => Some(volume(Source::Directory(ROOT.into()), top, Writes::Private)),
            Root::Image(_) | Root::Container(_) if self.export_changes.is_some() => {
                Some(volume(Source::Disk(ROOT.into()), top, Writes::Private))
            }
            // The disk itself forgets.
            Root::Image(_) | Root::Container(_) => {
                Some(volume(Source::Disk(ROOT.into()), top, Writes::Through))
            }
        };
        let volumes = self.volumes.iter().zip(1..).map(|(of, number)| {
            let writes = match of.access {
                Access::Ro => Writes::Refused,
                Access::Rw => Writes::Through,
                Access::Cow => Writes::Private,
            };
            volume(Source::Directory(tag(number).into_bytes()), &of.guest, writes)
        });
        let hostname = self.hostname.clone().into_bytes();
        Orders {
            port: PORT,
            systemd: self.systemd,
            hostname,
            root,
            volumes: volumes.collect(),
            changes: self.export_changes.is_some(),
            ..Orders::default()
        }
    }

    /// Modules without which there is no root.
    fn vital(&self) -> impl Iterator<Item = Driver> {
        let private = self.volumes.iter().any(|volume| volume.access == Access::Cow);
        let layered = private || matches!(self.root, Root::Directory(_)) || self.export_changes.is_some();
        let unpacked = matches!(self.root, Root::Container(_));
        layered.then_some(OVERLAY).into_iter().chain(unpacked.then_some(UNPACKED))
    }

    /// Modules that may be of use for the root.
    fn wished(&self) -> impl Iterator<Item = Driver> {
        let module = |kind: FileSystem| Some(Driver { module: kind.name, option: kind.option? });
        let on_disk = matches!(self.root, Root::Image(_));
        ON_DISKS.into_iter().filter(move |_| on_disk).filter_map(module)
    }
}

impl Plan {
    /// Adds what the command needs of the machine. Devices of mayfly's own are made anew: those in the plan may have been
    /// made for another root.
    pub(super) fn equip(&mut self) -> Result<()> {
        let Some(command) = &mut self.command else { return Ok(()) };
        if command.workdir.as_os_str().is_empty() {
            command.workdir = "/".into();
        }
        if self.initrd.last() != Some(&Initrd::Builtin) {
            // The last one counts: the agent is process 1, whatever the others bring.
            self.initrd.retain(|initrd| *initrd != Initrd::Builtin);
            self.initrd.push(Initrd::Builtin);
        }
        let unpacked = match &command.root {
            Root::Container(container) => container.unpacked()?,
            _ => PathBuf::new(),
        };
        let mut wanted = vec![(CALLS.to_owned(), Purpose::Calls)];
        match &command.root {
            Root::Initrd => {}
            Root::Directory(path) => {
                wanted.push((
                    ROOT.to_owned(),
                    Purpose::Directory { path, tag: ROOT, access: catalog::Access::Layered },
                ));
            }
            Root::Container(_) => {
                wanted.push((ROOT.to_owned(), Purpose::Disk { image: &unpacked, serial: ROOT, keep: false }));
            }
            Root::Image(image) => {
                wanted.push((ROOT.to_owned(), Purpose::Disk { image, serial: ROOT, keep: false }));
            }
        }
        let tags: Vec<_> = (1..).take(command.volumes.len()).map(tag).collect();
        for (volume, tag) in command.volumes.iter().zip(&tags) {
            let access = match volume.access {
                Access::Ro => catalog::Access::Read,
                Access::Rw => catalog::Access::Through,
                Access::Cow => catalog::Access::Layered,
            };
            wanted.push((tag.clone(), Purpose::Directory { path: &volume.host, tag, access }));
        }
        self.devices.retain(|device| !is_ours(device));
        for (name, purpose) in wanted {
            let Some(made) = serve(&name, purpose, &self.devices)? else { continue };
            match self.devices.iter().find(|device| device.name == name) {
                None => self.devices.push(made),
                // It is what is wanted, and tuned by hand.
                Some(device) if does(device, &made) => {}
                Some(device) => {
                    return Err(Fail::new(Why::Usage, format!("give the guest its {name}"))
                        .because(format!("the plan has another device `{name}`, of kind {}", device.kind))
                        .hint("take it out of the plan, or give it another name"));
                }
            }
        }
        for entry in CATALOG.iter().filter(|entry| matches!(entry.presence(), Presence::Standard(_))) {
            let given = self.devices.iter().any(|device| device.kind == entry.name());
            if let (false, Some(spec)) = (given, entry.serve(Purpose::Console)?) {
                self.devices.push(Device { kind: entry.name().to_owned(), name: String::new(), spec });
            }
        }
        Ok(())
    }

    /// The modules that the guest's kernel needs to do what is asked of it, and those that are of use to it.
    pub fn modules(&self, transport: Driver) -> (Vec<Driver>, Vec<Driver>) {
        let drivers =
            |device: &Device| catalog::find(&device.kind).map_or(&[] as &[Driver], |entry| entry.drivers());
        let Some(command) = &self.command else {
            let all = self.devices.iter().flat_map(drivers).copied();
            return (Vec::new(), [transport].into_iter().chain(all).collect());
        };
        let (ours, others): (Vec<_>, Vec<_>) = self
            .devices
            .iter()
            .partition(|device| is_tag(&device.name) || carries_calls(device) || device.is_ordered());
        let vital = ours.into_iter().flat_map(drivers).copied().chain(command.vital());
        let wished = others.into_iter().flat_map(drivers).copied().chain(command.wished());
        ([transport].into_iter().chain(vital).collect(), wished.collect())
    }
}

/// The name of the device with the volume of that number, and its tag in the guest.
fn tag(number: u32) -> String {
    format!("volume{number}")
}

/// Whether a device has the root or a volume.
fn is_tag(name: &str) -> bool {
    name == ROOT || name.starts_with("volume")
}

/// Whether a device is one that was made for a root or a volume, and is as it was made.
fn is_ours(device: &Device) -> bool {
    let tag = device.name.as_str();
    let Some((entry, spec)) = settings(device).filter(|_| is_tag(tag)) else { return false };
    // Paths are text in a plan, whatever the setting is called.
    let paths = spec.as_object().into_iter().flat_map(|settings| settings.values()).filter_map(Value::as_str);
    paths.map(Path::new).any(|path| {
        let directory = |access| Purpose::Directory { path, tag, access };
        let purposes = [
            Purpose::Disk { image: path, serial: tag, keep: false },
            directory(catalog::Access::Read),
            directory(catalog::Access::Through),
            directory(catalog::Access::Layered),
        ];
        purposes.into_iter().any(|purpose| matches!(entry.serve(purpose), Ok(Some(made)) if made == spec))
    })
}

/// Whether a device is as `made`, but for settings that `made` leaves open.
fn does(device: &Device, made: &Device) -> bool {
    let Some((_, spec)) = settings(device).filter(|_| device.kind == made.kind) else { return false };
    let wanted = made.spec.as_object();
    wanted.is_some_and(|wanted| wanted.iter().all(|(key, value)| spec.get(key) == Some(value)))
}

/// The settings of a device with the defaults filled in.
fn settings(device: &Device) -> Option<(&'static dyn Entry, Value)> {
    let entry = catalog::find(&device.kind)?;
    Some((entry, entry.check(&device.spec, &device.name).ok()?))
}

/// Whether a device is of the kind that carries the guest's calls.
fn carries_calls(device: &Device) -> bool {
    let entry = catalog::find(&device.kind);
    entry.is_some_and(|entry| matches!(entry.serve(Purpose::Calls), Ok(Some(_))))
}

/// A device that serves a purpose; `None` if one of the kind that carries calls is there: Linux has one only.
fn serve(name: &str, purpose: Purpose<'_>, there: &[Device]) -> Result<Option<Device>> {
    for entry in CATALOG {
        if let Some(spec) = entry.serve(purpose)? {
            let calls = matches!(purpose, Purpose::Calls);
            if let Some(device) = there.iter().find(|device| calls && device.kind == entry.name()) {
                return if entry.does_serve(&device.spec, purpose)? {
                    Ok(None)
                } else {
                    Err(Fail::new(
                        Why::Usage,
                        format!("run a command beside the {} device that is given", device.kind),
                    )
                    .because("the guest calls this process, and that one does not lead here")
                    .hint("pass vhost=off to it, or leave it out"))
                };
            }
            return Ok(Some(Device { kind: entry.name().to_owned(), name: name.to_owned(), spec }));
        }
    }
    Err(Fail::new(Why::Unsupported, format!("give the guest its {name}"))
        .because("there is no device for that"))
}
