//! Network cards: virtio-net on a tap, on a NAT in this process, or on passt (virtio 1.2, section 5.1).

mod control;
mod device;
mod inside;
mod vhost;

use std::fs::File;
use std::hash::Hasher;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use base::fail::why_of;
use base::host::{Access, Door, Host, is_tap_name};
use base::throttle::{Rate, Throttle};
use base::{Fail, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::amount::Amount;
use crate::catalog::{Body, Driver, Interface, Kind, Kit, Presence};
use crate::net::Link;
use crate::net::passt::PasstLink;
use crate::net::tap::TapLink;
use crate::net::user::packet::Mac;
use crate::net::user::{Policy, Publish, Settings, User};
use device::{Card, Net};

/// The kind.
pub struct This;

/// A network card of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// What the card leads to: user (a NAT in this process, no rights needed), tap, passt, or none.
    #[serde(default)]
    pub mode: Option<Mode>,
    /// The tap interface (mode tap). One that exists is used and stays; without a name one is made and goes with the
    /// machine.
    #[serde(default)]
    pub tap: Option<String>,
    /// The Unix stream socket of a running passt (mode passt).
    #[serde(default)]
    pub passt: Option<String>,
    /// The Ethernet address, 02:00:00:00:00:01 for instance (default: made from the names of the card, its tap and the
    /// host, so it stays the same).
    #[serde(default)]
    pub mac: Option<String>,
    /// The largest IP packet in bytes, 1280 to 65520 (default: the tap's, else 1500).
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to 8: more than one only with a tap (default: 1).
    #[serde(default)]
    pub queues: Option<u16>,
    /// Mode tap: on: the host's kernel carries the frames (vhost-net); auto: it does where it can, and no limit is set; off:
    /// this process does (default: off).
    #[serde(default, skip_serializing_if = "vhost::Choice::is_off")]
    pub vhost: vhost::Choice,
    /// Bytes in a second at the most, in each direction, such as 10M (default: no limit).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Amount>,
    /// Bytes that may be saved up for a burst (default: those of one second).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_burst: Option<Amount>,
    /// Frames in a second at the most, in each direction; a large segment is one (default: no limit).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets: Option<u64>,
    /// Frames that may be saved up for a burst (default: those of one second).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub packets_burst: Option<u64>,
    /// Mode user: a port of this machine that leads into the guest, [ADDRESS:]HOST:GUEST[/udp]; may be repeated. Without an
    /// address only this machine itself reaches it.
    #[serde(default)]
    pub publish: Vec<String>,
    /// Mode user: where the guest may go, NAME|CIDR[:PORT]; may be repeated. Without one: everywhere but to this machine
    /// itself and link-local addresses.
    #[serde(default)]
    pub allow: Vec<String>,
    /// Mode user: the name server that answers the guest's questions, ADDRESS[:PORT] (default: the first that works of
    /// those in /etc/resolv.conf). Other modes: the one that a guest with a command is told.
    #[serde(default)]
    pub dns: Option<String>,
    /// Mode tap or passt: the address of a guest with a command, ADDRESS/PREFIX; may be repeated (default: the guest sets
    /// the card up itself).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guest: Vec<String>,
    /// Mode tap or passt: where a guest with a command sends what is for elsewhere; may be repeated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateway: Vec<String>,
    /// Mode user: on: the gateway (10.0.2.2) leads to the loopback address of this machine.
    #[serde(default)]
    pub loopback: bool,
    /// Mode user: on: the guest gets IPv6 too.
    #[serde(default = "on")]
    pub ipv6: bool,
    /// Mode user: a file in which all frames are recorded, for Wireshark or tcpdump.
    #[serde(default)]
    pub pcap: Option<String>,
}

fn on() -> bool {
    true
}

/// What a network card leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Nothing: there is no card.
    None,
    /// A NAT in this process.
    User,
    /// A tap interface of the host.
    Tap,
    /// passt, a program that does what mode user does.
    Passt,
}

const PAIRS_MAX: u16 = 8;

impl Kind for This {
    type Spec = Spec;
    const NAME: &'static str = "net";
    const FLAG: &'static str = "net";
    const SUMMARY: &'static str = "a network card (virtio-net): a NAT without any rights, a tap, or passt";
    const BARE: &'static str = "mode";
    const EXAMPLE: &'static str = "user,allow=*.example.org:443,allow=192.0.2.0/24";
    const PRESENCE: Presence = Presence::OnRequest;
    const DRIVERS: &'static [Driver] = &[Driver { module: "virtio_net", option: "VIRTIO_NET" }];

    fn check(spec: &Spec, name: &str) -> Result<()> {
        let mode = mode(spec, name)?;
        check(spec, mode, name)?;
        vhost::check(spec, mode, name)?;
        spec.mac.as_ref().map(|text| address(text, name)).transpose()?;
        inside::interface(spec, name)?;
        if mode != Mode::User {
            return Ok(());
        }
        settings(spec, Mac::default(), name).map(drop)
    }

    fn interface(spec: &Spec, name: &str) -> Result<Option<Interface>> {
        inside::interface(spec, name)
    }

    fn claim(spec: &Spec, name: &str, host: &dyn Host) -> Result<Vec<File>> {
        let settings = settings(spec, Mac::default(), name)?;
        let ports: Vec<_> = settings.publish.iter().map(|publish| publish.host).collect();
        if !ports.is_empty() {
            host.door(name, Door::Ports(&ports))?;
        }
        if let Some(path) = &spec.passt {
            host.door(name, Door::Program(Path::new(path)))?;
        }
        Ok(settings.record(name, host)?.into_iter().collect())
    }

    fn build(spec: &Spec, kit: &Kit<'_>) -> Result<Body> {
        let mode = mode(spec, kit.name)?;
        let given = spec.mac.as_ref().map(|text| address(text, kit.name)).transpose()?;
        let mut mac = given.unwrap_or_else(|| invent(&[kit.name]));
        let pairs = spec.queues.unwrap_or(1);
        let link: Box<dyn Link> = match mode {
            Mode::None => return Ok(Body::Absent),
            Mode::Tap => {
                let tap = kit.host.tap(kit.name, spec.tap.as_deref(), pairs.into())?;
                if given.is_none() {
                    // Other machines are on the same wire: of this host, and of others.
                    mac = invent(&[kit.name, &tap.name, &machine(kit)]);
                }
                Box::new(TapLink::new(tap, kit.name, spec.mtu, vhost::workers(spec, pairs, kit)?))
            }
            Mode::Passt => {
                let path = Path::new(spec.passt.as_deref().unwrap_or_default());
                let socket = (kit.host.dialer())(path).map_err(|cause| refused(&cause, kit.name, path))?;
                Box::new(PasstLink::new(socket, kit.name, spec.mtu.unwrap_or(1500)))
            }
            Mode::User => Box::new(User::new(settings(spec, mac, kit.name)?, kit)?),
        };
        Ok(Body::Virtio(Box::new(Net::new(Card { mac, pairs, limits: limits(spec, kit) }, link))))
    }
}

/// Makes the limits of one direction.
fn limits(spec: &Spec, kit: &Kit<'_>) -> Box<dyn Fn() -> Throttle + Send> {
    let rate = |limit: Option<u64>, burst: Option<u64>| {
        limit.map(|per_second| Rate { per_second, burst: burst.unwrap_or(per_second).max(1) })
    };
    let packets = rate(spec.packets, spec.packets_burst);
    let bytes = rate(spec.bandwidth.map(|amount| amount.0), spec.bandwidth_burst.map(|amount| amount.0));
    let clock = kit.clock.clone();
    Box::new(move || Throttle::new(packets, bytes, clock.clone()))
}

/// There is no passt at `path`.
fn refused(cause: &std::io::Error, name: &str, path: &Path) -> Fail {
    let fail = Fail::new(why_of(cause), format!("connect {name} to {}", path.display()));
    let hint = format!("start it first: passt --socket {}", path.display());
    fail.because(cause.to_string()).hint(hint)
}

fn wrong(name: &str, what: &str, cause: &str, hint: &str) -> Fail {
    Fail::new(Why::Usage, format!("give {name} {what}")).because(cause).hint(hint)
}

/// What the settings ask for: a tap's or a socket's name says it too.
fn mode(spec: &Spec, name: &str) -> Result<Mode> {
    let said = [(spec.tap.is_some(), Mode::Tap), (spec.passt.is_some(), Mode::Passt)];
    let mut modes = said.into_iter().filter(|(is, _)| *is).map(|(_, mode)| mode).chain(spec.mode);
    let first = modes.next().unwrap_or(Mode::User);
    if modes.any(|other| other != first) {
        return Err(wrong(
            name,
            "two modes",
            "a card leads to one thing",
            "use one --net flag for each card",
        ));
    }
    if first == Mode::Passt && spec.passt.is_none() {
        return Err(wrong(
            name,
            "mode passt",
            "the socket is not named",
            "start `passt --socket PATH`, then pass --net passt=PATH",
        ));
    }
    Ok(first)
}

fn check(spec: &Spec, mode: Mode, name: &str) -> Result<()> {
    let user_only = [
        ("publish", !spec.publish.is_empty()),
        ("allow", !spec.allow.is_empty()),
        ("loopback", spec.loopback),
        ("pcap", spec.pcap.is_some()),
    ];
    if let Some((key, _)) = user_only.iter().find(|(_, given)| *given && mode != Mode::User) {
        let hint = "use mode user, or set it up where the other end of the card is";
        return Err(wrong(name, key, "only mode user knows it", hint));
    }
    let others_only = [("guest", !spec.guest.is_empty()), ("gateway", !spec.gateway.is_empty())];
    if let Some((key, _)) = others_only.iter().find(|(_, given)| *given && mode == Mode::User) {
        return Err(wrong(name, key, "mode user has addresses of its own", "leave it out, or use a tap"));
    }
    if let Some(tap) = spec.tap.as_ref().filter(|tap| !is_tap_name(tap)) {
        return Err(wrong(
            name,
            &format!("the tap `{tap}`"),
            "a name has 1 to 15 bytes, without slash and space",
            "`ip tuntap` shows the taps there are; --net tap makes one",
        ));
    }
    if spec.bandwidth == Some(Amount(0)) || spec.packets == Some(0) {
        return Err(wrong(name, "a limit of 0", "nothing would pass", "leave it out for no limit"));
    }
    let alone = spec.bandwidth.is_none() && spec.bandwidth_burst.is_some()
        || spec.packets.is_none() && spec.packets_burst.is_some();
    if alone {
        return Err(wrong(
            name,
            "a burst",
            "there is no limit that it exceeds",
            "pass bandwidth or packets as well",
        ));
    }
    match spec.queues {
        Some(pairs) if !(1..=PAIRS_MAX).contains(&pairs) => {
            return Err(wrong(
                name,
                "that many queues",
                "there can be 1 to 8",
                "one for each vCPU is enough",
            ));
        }
        Some(2..) if mode != Mode::Tap => {
            return Err(wrong(name, "several queues", "only a tap has them", "pass queues=1"));
        }
        _ => {}
    }
    match spec.mtu {
        Some(mtu) if !(1280..=65_520).contains(&mtu) => {
            Err(wrong(name, &format!("an MTU of {mtu}"), "it has to be 1280 to 65520", "1500 is usual"))
        }
        _ => Ok(()),
    }
}

fn settings(spec: &Spec, mac: Mac, name: &str) -> Result<Settings> {
    let server = |text: &String| {
        let plain = text.parse::<IpAddr>().map(|address| SocketAddr::new(address, 53));
        plain.or_else(|_| text.parse::<SocketAddr>()).map_err(|_| {
            wrong(
                name,
                &format!("the name server {text}"),
                "it is no address",
                "dns=192.0.2.1 or dns=192.0.2.1:5353",
            )
        })
    };
    Ok(Settings {
        mac,
        mtu: spec.mtu.unwrap_or(1500),
        publish: spec.publish.iter().map(|text| Publish::read(text, name)).collect::<Result<_>>()?,
        policy: Policy::read(&spec.allow, name)?,
        dns: spec.dns.as_ref().map(server).transpose()?,
        loopback: spec.loopback,
        ipv6: spec.ipv6,
        pcap: spec.pcap.clone(),
    })
}

/// Reads an Ethernet address: six pairs of hexadecimal digits, of a card and not of a group.
fn address(text: &str, name: &str) -> Result<Mac> {
    let parts: Vec<&str> = text.split(':').collect();
    let bytes: Option<Vec<u8>> = parts
        .iter()
        .map(|part| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten())
        .collect();
    let mac = bytes.and_then(|bytes| Mac::try_from(bytes).ok());
    mac.filter(|mac| mac.first().is_some_and(|first| first & 1 == 0) && *mac != [0; 6]).ok_or_else(|| {
        wrong(name, &format!("the address {text}"), "it is no address of a card", "mac=02:00:00:00:00:01")
    })
}

/// What tells this host from others; empty if it has no such file.
fn machine(kit: &Kit<'_>) -> String {
    let mut text = Vec::new();
    let opened = kit.host.open(kit.name, Path::new("/etc/machine-id"), Access::default());
    if let Ok(file) = opened {
        // What cannot be read tells nothing.
        let _ = file.take(64).read_to_end(&mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// An address that is always the same for the same names, marked as locally administered (IEEE 802, section 8.4).
fn invent(names: &[&str]) -> Mac {
    // Not for secrets: it has to be the same in every build of every version, which the library's hashers are not.
    let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
    for name in names {
        hash.write(name.as_bytes());
        hash.write(&[0]);
    }
    let [a, b, c, d, e, ..] = hash.finish().to_be_bytes();
    [0x02, a, b, c, d, e]
}

/// The hash FNV-1a.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_invented() {
        assert_eq!(address("02:00:5e:10:ff:01", "net0").unwrap(), [2, 0, 0x5e, 0x10, 0xff, 1]);
        for wrong in [
            "",
            "02:00:00:00:00",
            "01:00:00:00:00:01",
            "2:0:0:0:0:1",
            "00:00:00:00:00:00",
            "zz:00:00:00:00:01",
        ] {
            assert!(address(wrong, "net0").is_err(), "{wrong}");
        }
        assert_eq!(invent(&["net0"]), invent(&["net0"]));
        assert_ne!(invent(&["net0"]), invent(&["net1"]));
        assert_ne!(invent(&["net0", "tap1"]), invent(&["net0t", "ap1"]));
        assert_eq!(invent(&["net0"])[0] & 3, 2, "locally administered, of one card");
    }

    #[test]
    fn settings_that_contradict_are_refused() {
        let spec = |mode, tap: Option<&str>| Spec { mode, tap: tap.map(str::to_owned), ..Spec::default() };
        assert_eq!(mode(&spec(None, Some("tap0")), "net0").unwrap(), Mode::Tap);
        assert_eq!(mode(&spec(None, None), "net0").unwrap(), Mode::User);
        assert!(mode(&spec(Some(Mode::User), Some("tap0")), "net0").is_err());
        assert!(mode(&spec(Some(Mode::Passt), None), "net0").is_err());
        let published = Spec { publish: vec!["1:1".into()], ..Spec::default() };
        assert!(check(&published, Mode::Tap, "net0").is_err());
        for (queues, mode, good) in
            [(0, Mode::Tap, false), (8, Mode::Tap, true), (9, Mode::Tap, false), (2, Mode::User, false)]
        {
            let spec = Spec { queues: Some(queues), ..Spec::default() };
            assert_eq!(check(&spec, mode, "net0").is_ok(), good, "{queues} {mode:?}");
        }
        assert!(check(&Spec { mtu: Some(1000), ..Spec::default() }, Mode::User, "net0").is_err());
    }
}
