//! Where the guest may go: rules that are checked here, outside the guest, for each new flow.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use base::{Fail, Result, Why};

/// Addresses learned from answers of the resolver that are kept.
const LEARNED: usize = 4096;
/// How long an address belongs to a name at the least: programs keep addresses longer than the answer says.
const KEPT: Duration = Duration::from_secs(300);
/// And at the most.
const LONGEST: Duration = Duration::from_secs(86_400);

/// One `allow=` rule.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    target: Target,
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    /// A name, or with a leading `*.` all names below it; `*` is every name.
    Name(String),
    /// Addresses that share so many first bits.
    Net(IpAddr, u8),
}

/// All rules, and the addresses that names stand for.
#[derive(Debug, Default)]
pub struct Policy {
    rules: Vec<Rule>,
    /// Until when an address belongs to a name, and by which rules.
    learned: HashMap<IpAddr, (Duration, Vec<usize>)>,
}

impl Policy {
    /// Reads rules `NAME|CIDR[:PORT]`. Without any, everything is allowed that is not barred.
    ///
    /// # Errors
    /// [`Why::Usage`]: one is neither.
    pub fn read(rules: &[String], name: &str) -> Result<Policy> {
        let rules = rules.iter().map(|text| {
            let fail = || Fail::new(Why::Usage, format!("read the rule allow={text} of {name}"));
            let rule = rule(text).ok_or_else(|| {
                fail()
                    .because("it is neither a name nor an address range")
                    .hint("write it as example.org, *.example.org:443, 192.0.2.0/24, or [2001:db8::/32]:443")
            })?;
            // One of them is a mistake, and nobody but the user knows which.
            match &rule.target {
                Target::Net(address, bits) if first(*address, *bits) != *address => Err(fail()
                    .because(format!("{address} is not the first address of a range of /{bits}"))
                    .hint(format!(
                        "write {}/{bits} for the range, {address} for the one address",
                        first(*address, *bits)
                    ))),
                _ => Ok(rule),
            }
        });
        Ok(Policy { rules: rules.collect::<Result<_>>()?, learned: HashMap::new() })
    }

    /// Whether there are rules.
    pub fn restricts(&self) -> bool {
        !self.rules.is_empty()
    }

    /// Whether a flow to `target` may begin; `port` is 0 where there is none.
    pub fn allows(&self, target: IpAddr, port: u16, now: Duration) -> bool {
        if never(target) {
            return false;
        }
        if self.rules.is_empty() {
            return !shy(target);
        }
        let learned = self.learned.get(&target).filter(|(until, _)| *until > now);
        let by_name = |at: usize| learned.is_some_and(|(_, rules)| rules.contains(&at));
        self.rules.iter().enumerate().any(|(at, rule)| {
            let there = match &rule.target {
                Target::Net(net, bits) => within(target, *net, *bits),
                Target::Name(_) => by_name(at),
            };
            there && rule.port.is_none_or(|only| only == port)
        })
    }

    /// Whether the resolver may be asked for `name` (lower case, no final dot).
    pub fn resolves(&self, name: &str) -> bool {
        self.rules.is_empty() || self.rules.iter().any(|rule| rule.names(name))
    }

    /// The resolver has answered that `name` is at `address` for the next `seconds`.
    pub fn learn(&mut self, name: &str, address: IpAddr, seconds: u32, now: Duration) {
        // A name that points at this machine or its neighbourhood would open what no rule names.
        if self.rules.is_empty() || never(address) || shy(address) {
            return;
        }
        let named = |(at, rule): (usize, &Rule)| rule.names(name).then_some(at);
        let rules: Vec<usize> = self.rules.iter().enumerate().filter_map(named).collect();
        if rules.is_empty() {
            return;
        }
        if self.learned.len() >= LEARNED {
            self.learned.retain(|_, (until, _)| *until > now);
        }
        if self.learned.len() >= LEARNED && !self.learned.contains_key(&address) {
            return;
        }
        let until = now.saturating_add(Duration::from_secs(seconds.into()).clamp(KEPT, LONGEST));
        let (old, known) = self.learned.entry(address).or_default();
        *old = until.max(*old);
        known.extend(rules);
        known.sort_unstable();
        known.dedup();
    }
}

impl Rule {
    fn names(&self, name: &str) -> bool {
        let Target::Name(pattern) = &self.target else { return false };
        match pattern.strip_prefix('*') {
            Some("") => true,
            Some(end) => name.len() > end.len() && name.ends_with(end),
            None => pattern == name,
        }
    }
}

fn rule(text: &str) -> Option<Rule> {
    let (target, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (target, port) = rest.split_once(']')?;
            (target, if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
        }
        // An IPv6 address has colons of its own.
        None if text.matches(':').count() > 1 => (text, None),
        None => text.split_once(':').map_or((text, None), |(target, port)| (target, Some(port))),
    };
    let port =
        port.map(|port| port.parse::<u16>().ok().filter(|port| *port > 0).ok_or(())).transpose().ok()?;
    Some(Rule { target: net(target).or_else(|| name(target))?, port })
}

fn net(text: &str) -> Option<Target> {
    let (address, bits) = text.split_once('/').map_or((text, None), |(a, b)| (a, Some(b)));
    let address: IpAddr = address.parse().ok()?;
    let most = if address.is_ipv4() { 32 } else { 128 };
    let bits = bits.map_or(Some(most), |bits| bits.parse().ok())?;
    (bits <= most).then_some(Target::Net(address, bits))
}

/// The first of the addresses that share so many first bits with `address`.
fn first(address: IpAddr, bits: u8) -> IpAddr {
    let bits = u32::from(bits);
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32u32.saturating_sub(bits)).unwrap_or(0);
            Ipv4Addr::from(u32::from(v4) & mask).into()
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128u32.saturating_sub(bits)).unwrap_or(0);
            Ipv6Addr::from(u128::from(v6) & mask).into()
        }
    }
}

fn name(text: &str) -> Option<Target> {
    let plain = text.strip_prefix("*.").unwrap_or(text);
    let letters = |part: &str| {
        !part.is_empty()
            && part.len() <= 63
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    // A range that is none is a mistake, not a name.
    let numbers = plain.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let good = text == "*" || (!numbers && plain.len() < 254 && plain.split('.').all(letters));
    good.then(|| Target::Name(text.to_ascii_lowercase()))
}

fn within(address: IpAddr, net: IpAddr, bits: u8) -> bool {
    let same = |a: u128, b: u128, width: u32| {
        let shift = width.saturating_sub(bits.into());
        a.checked_shr(shift).unwrap_or(0) == b.checked_shr(shift).unwrap_or(0)
    };
    match (address, net) {
        (IpAddr::V4(a), IpAddr::V4(b)) => same(u32::from(a).into(), u32::from(b).into(), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => same(a.into(), b.into(), 128),
        _ => false,
    }
}

/// Addresses that no rule opens: this machine's own, and those that are nobody's.
fn never(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => never_v4(v4),
        IpAddr::V6(v6) => {
            let inner = v6.to_ipv4_mapped().is_some() || (v6.segments().starts_with(&[0; 6]));
            v6.is_loopback() || v6.is_unspecified() || v6.is_multicast() || inner || within_v6(v6)
        }
    }
}

fn never_v4(v4: Ipv4Addr) -> bool {
    let [first, ..] = v4.octets();
    // 0.0.0.0/8 reaches this machine, 240.0.0.0/4 nobody.
    v4.is_loopback() || first == 0 || first >= 224
}

/// 6to4 and NAT64 carry an IPv4 address that must be judged as one.
fn within_v6(v6: Ipv6Addr) -> bool {
    let bytes = v6.octets();
    let [_, _, a, b, c, d, ..] = bytes;
    let [.., w, x, y, z] = bytes;
    match v6.segments() {
        [0x2002, ..] => never_v4(Ipv4Addr::new(a, b, c, d)),
        [0x64, 0xff9b, 0, 0, 0, 0, ..] => {
            let v4 = Ipv4Addr::new(w, x, y, z);
            never_v4(v4) || v4.is_link_local()
        }
        _ => false,
    }
}

/// Addresses that are open only to a rule with their range: the neighbourhood of this machine, where clouds answer
/// questions that only it should ask (169.254.169.254).
fn shy(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => {
            v6.is_unicast_link_local() || v6 == Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: &[&str]) -> Policy {
        let rules: Vec<String> = rules.iter().map(|rule| (*rule).to_owned()).collect();
        Policy::read(&rules, "net0").unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    const NOW: Duration = Duration::from_secs(1000);

    #[test]
    fn without_rules_all_is_open_but_the_hosts_own() {
        let open = policy(&[]);
        for there in ["192.0.2.1", "8.8.8.8", "10.1.1.1", "2001:db8::1"] {
            assert!(open.allows(ip(there), 80, NOW), "{there}");
        }
        for barred in [
            "127.0.0.1",
            "0.0.0.0",
            "0.1.2.3",
            "255.255.255.255",
            "224.0.0.1",
            "169.254.169.254",
            "::1",
            "::",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "::127.0.0.1",
            "fe80::1",
            "ff02::1",
            "64:ff9b::7f00:1",
            "2002:7f00:1::",
        ] {
            assert!(!open.allows(ip(barred), 80, NOW), "{barred}");
        }
    }

    #[test]
    fn rules_open_ranges_and_ports() {
        let some =
            policy(&["192.0.2.0/24:443", "[2001:db8::/32]:53", "169.254.169.254", "fd00::/8", "0.0.0.0/0:7"]);
        assert!(some.allows(ip("192.0.2.200"), 443, NOW) && !some.allows(ip("192.0.2.200"), 80, NOW));
        assert!(some.allows(ip("2001:db8:1::"), 53, NOW) && !some.allows(ip("2001:db8:1::"), 54, NOW));
        assert!(some.allows(ip("169.254.169.254"), 80, NOW), "named, so open");
        assert!(some.allows(ip("fd12::1"), 1, NOW) && !some.allows(ip("2a00::1"), 1, NOW));
        assert!(some.allows(ip("8.8.8.8"), 7, NOW) && !some.allows(ip("127.0.0.1"), 7, NOW));
    }

    #[test]
    fn names_open_what_the_resolver_says() {
        let mut named = policy(&["example.org:443", "*.internal"]);
        assert!(named.resolves("example.org") && named.resolves("a.b.internal"));
        for other in ["www.example.org", "internal", "xinternal", "example.org.evil", ""] {
            assert!(!named.resolves(other), "{other}");
        }
        let there = ip("203.0.113.5");
        named.learn("evil.net", there, 9, NOW);
        assert!(!named.allows(there, 443, NOW), "a name without a rule opens nothing");
        named.learn("example.org", there, 9, NOW);
        assert!(named.allows(there, 443, NOW) && !named.allows(there, 80, NOW));
        assert!(!named.allows(there, 443, NOW + KEPT), "an address belongs to a name for a while");
        for inside in ["127.0.0.1", "169.254.169.254", "fe80::1"] {
            named.learn("example.org", ip(inside), 9, NOW);
            assert!(!named.allows(ip(inside), 443, NOW), "{inside}");
        }
        for n in 0..10_000u32 {
            named.learn("example.org", Ipv4Addr::from(0xc000_0000 + n).into(), 9, NOW);
        }
        assert!(named.learned.len() <= LEARNED);
    }

    #[test]
    fn a_range_begins_with_its_first_address() {
        for (text, remedy) in [
            ("10.0.0.1/8", "write 10.0.0.0/8 for the range, 10.0.0.1 for the one address"),
            ("192.0.2.1/0:80", "write 0.0.0.0/0 for the range, 192.0.2.1 for the one address"),
            ("[2001:db8::1/32]:443", "write 2001:db8::/32 for the range, 2001:db8::1 for the one address"),
        ] {
            let fail = Policy::read(&[text.to_owned()], "net0").unwrap_err();
            assert_eq!(fail.remedy(), Some(remedy), "{fail}");
        }
        policy(&["10.0.0.1/32", "10.0.0.1", "::1/128", "::/0"]);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "300.1.2.3",
            "1.2.3.4/33",
            "a b",
            "example.org:0",
            "example.org:99999",
            "[fd00::1",
            "fd00::/129",
            "10.0.0/8",
            "-:x",
        ] {
            let fail = Policy::read(&[text.to_owned()], "net0").unwrap_err().to_string();
            assert!(fail.starts_with(&format!("read the rule allow={text} of net0: ")), "{fail}");
        }
    }
}
