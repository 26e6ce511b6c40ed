//! What a card is to the guest: its address, the way out, and who knows names.

use std::net::IpAddr;

use base::Result;

use super::{Mode, Spec, address, invent, mode, wrong};
use crate::catalog::Interface;
use crate::net::user::{GATEWAY4, GUEST4, GUEST6, ROUTER6};

/// The interface as the guest is to find it; `None` where that is the guest's own matter.
///
/// # Errors
/// The settings make no sense.
pub fn interface(spec: &Spec, name: &str) -> Result<Option<Interface>> {
    let given = spec.mac.as_ref().map(|text| address(text, name)).transpose()?;
    match mode(spec, name)? {
        Mode::None => Ok(None),
        Mode::User => {
            let mut found = Interface {
                mac: Some(given.unwrap_or_else(|| invent(&[name]))),
                addresses: vec![(GUEST4.into(), 24)],
                gateways: vec![GATEWAY4.into()],
                servers: vec![GATEWAY4.into()],
            };
            if spec.ipv6 {
                found.addresses.push((GUEST6.into(), 64));
                found.gateways.push(ROUTER6.into());
            }
            Ok(Some(found))
        }
        Mode::Tap | Mode::Passt => by_hand(spec, given, name),
    }
}

/// What the operator says of a network that is theirs.
fn by_hand(spec: &Spec, mac: Option<[u8; 6]>, name: &str) -> Result<Option<Interface>> {
    let bad = |what: String| {
        let hint = "an example: --net tap=tap0,guest=192.168.77.2/24,gateway=192.168.77.1,dns=192.168.77.1";
        wrong(name, &what, "it is no address", hint)
    };
    let addresses = spec.guest.iter().map(|text| prefixed(text).ok_or_else(|| bad(format!("guest={text}"))));
    let addresses = addresses.collect::<Result<Vec<_>>>()?;
    let plain = |key: &str, text: &String| text.parse().map_err(|_| bad(format!("{key}={text}")));
    let gateways = spec.gateway.iter().map(|text| plain("gateway", text)).collect::<Result<Vec<IpAddr>>>()?;
    let servers = spec.dns.iter().map(|text| plain("dns", text)).collect::<Result<Vec<IpAddr>>>()?;
    if addresses.is_empty() {
        if gateways.is_empty() && servers.is_empty() {
            return Ok(None);
        }
        let hint = "pass guest=ADDRESS/PREFIX as well, or leave both to the guest";
        return Err(wrong(name, "a gateway or a name server", "it has no address", hint));
    }
    if let Some(gateway) =
        gateways.iter().find(|way| !addresses.iter().any(|(own, _)| own.is_ipv4() == way.is_ipv4()))
    {
        let hint = "pass a guest=ADDRESS/PREFIX of its kind as well";
        return Err(wrong(name, &format!("the gateway {gateway}"), "it has no such address itself", hint));
    }
    Ok(Some(Interface { mac, addresses, gateways, servers }))
}

/// Reads ADDRESS/PREFIX.
fn prefixed(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let prefix = prefix.parse().ok().filter(|prefix| (1..=longest).contains(prefix))?;
    Some((address, prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::find;

    fn of(text: &str) -> Result<Option<Interface>> {
        let entry = find("net").unwrap();
        let spec = entry.check(&entry.parse(text)?, "net0")?;
        entry.interface(&spec, "net0")
    }

    #[test]
    fn the_nat_is_known_and_a_tap_is_what_it_is_said_to_be() {
        let user = of("user").unwrap().unwrap();
        assert_eq!(user.mac, Some(invent(&["net0"])), "as the card itself has it");
        assert_eq!(user.addresses[0], ("10.0.2.15".parse().unwrap(), 24));
        assert_eq!(user.addresses[1], ("fd6d:6179:666c:7900::f".parse().unwrap(), 64));
        assert_eq!(of("user,ipv6=off").unwrap().unwrap().addresses.len(), 1);
        assert_eq!(of("user,mac=02:00:00:00:00:09").unwrap().unwrap().mac, Some([2, 0, 0, 0, 0, 9]));
        assert_eq!(of("tap=tap0").unwrap(), None);
        assert_eq!(of("none").unwrap(), None);
        let tap =
            of("tap=tap0,guest=10.1.0.2/16,guest=fd00::2/64,gateway=10.1.0.1,dns=10.1.0.3").unwrap().unwrap();
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert_eq!(tap.addresses, [(ip("10.1.0.2"), 16), (ip("fd00::2"), 64)]);
        assert_eq!((tap.mac, tap.gateways, tap.servers), (None, vec![ip("10.1.0.1")], vec![ip("10.1.0.3")]));
    }

    #[test]
    fn what_is_no_address_is_refused() {
        for (text, told) in [
            ("tap,guest=10.1.0.2", "give net0 guest=10.1.0.2: it is no address"),
            ("tap,guest=10.1.0.2/33", "give net0 guest=10.1.0.2/33: "),
            ("tap,guest=10.1.0.2/8,gateway=x", "give net0 gateway=x: "),
            ("tap,gateway=10.1.0.1", "give net0 a gateway or a name server: it has no address"),
            ("tap,guest=10.1.0.2/8,gateway=fe80::1", "it has no such address itself"),
            ("user,guest=10.1.0.2/8", "give net0 guest: "),
        ] {
            let cause = of(text).unwrap_err().to_string();
            assert!(cause.contains(told), "{text}: {cause}");
        }
    }
}
