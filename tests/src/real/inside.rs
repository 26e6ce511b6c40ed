//! What a command finds in its guest: a network that is up, users with their groups, the file systems of any Linux.

use super::expect;
use crate::ground::quote;
use crate::harness::{Case, Room, Stop, Verdict};
use crate::kernels::Flavour;

pub fn cases() -> Vec<Case> {
    vec![Case::new("real::inside::network", network), Case::new("real::inside::users", users)]
}

/// The command line, as shell text, of a run of `command` (shell text too).
pub(crate) use super::roots::run;

pub(crate) fn line(room: &Room<'_>, arguments: &str, command: &str) -> Result<String, Stop> {
    super::roots::line(room, Flavour::Cloud, arguments, command)
}

/// A name server that knows one address: each question comes back with it.
const NAMES: &str = "$s = IO::Socket::INET->new(Proto => 'udp', LocalAddr => '127.0.0.1:53') or die $!;
    while (my $from = $s->recv(my $q, 512)) { substr($q, 2, 2) = pack 'n', 0x8180; my $v4 = unpack('n', substr $q, -4) == 1;
    substr($q, 6, 2) = pack 'n', $v4; $q .= pack 'nnnNnC4', 0xc00c, 1, 1, 60, 4, 192, 0, 2, 7 if $v4; $s->send($q, 0, $from) }";

/// The NAT works from the first moment of the command: both ways, by name, by ping and over IPv6. The servers are in a network
/// of the ground's own.
fn network(room: &mut Room<'_>) -> Verdict {
    let net = "user,loopback=on,dns=127.0.0.1,publish=8080:80";
    let guest = "sh -c 'B=busybox; echo v4=$($B wget -q -O - http://10.0.2.2:8000/given)
        echo v6=$($B wget -q -O - \"http://[fd6d:6179:666c:7900::2]:8000/given\")
        echo name=$($B nslookup mayfly.test 10.0.2.2 | $B grep -o 192.0.2.7)
        $B ping -c 1 -W 5 10.0.2.2 >/dev/null && echo ping=yes
        echo address=$($B ip -4 addr show dev eth0 | $B sed -n \"s/.*inet //p\" | $B cut -d\" \" -f1)
        echo resolver=$(cat /etc/resolv.conf); echo lo=$($B ip -4 addr show dev lo | $B grep -c 127.0.0.1/8)
        (echo served | $B nc -l -p 80) >/dev/null'";
    let run = line(room, &format!("--net {net}"), guest)?;
    // Its only line is the answer; before somebody listens in the guest, the connection is reset.
    let script = format!(
        "ip link set lo up; mkdir www; echo by-the-host >www/given;
         busybox httpd -f -p 127.0.0.1:8000 -h www & h=$!
         busybox httpd -f -p [::1]:8000 -h www & g=$!
         perl -MIO::Socket::INET -e {} & d=$!
         (until [ -s published ]; do busybox nc 127.0.0.1 8080 </dev/null >published 2>/dev/null; done) & b=$!
         {run}; s=$?; kill $h $g $d; echo published=$(cat published); exit $s",
        quote(NAMES)
    );
    let output = room.shell(&format!(
        "sum=$(sha256sum /etc/resolv.conf); unshare -n sh -c {}; s=$?
        [ \"$sum\" = \"$(sha256sum /etc/resolv.conf)\" ] && echo resolv_conf=unchanged; exit $s",
        quote(&script)
    ))?;
    output.code(0)?;
    for (key, wanted) in [
        ("v4", "by-the-host"),
        ("v6", "by-the-host"),
        ("name", "192.0.2.7"),
        ("ping", "yes"),
        ("address", "10.0.2.15/24"),
        ("resolver", "nameserver 10.0.2.2"),
        ("lo", "1"),
        ("published", "served"),
        ("resolv_conf", "unchanged"),
    ] {
        expect(&output, key, wanted)?;
    }
    Ok(())
}

/// A user has their groups, and owns their streams and their terminal.
fn users(room: &mut Room<'_>) -> Verdict {
    room.shell(
        "mkdir -p root/bin root/etc root/home/ann && cp /bin/busybox root/bin/sh && cd root/bin && \
         for p in id cat ls stat mount grep tty ip; do ln -s sh $p; done; cd ../etc
         echo ann:x:1000:1001::/home/ann: >passwd; printf 'own:x:1001:\\nkvm:x:106:bob,ann\\nsudo:x:27:ann\\n' >group",
    )?
    .code(0)?;
    let script = "sh -c 'id; for d in /dev/shm /dev/pts /proc /sys /sys/fs/cgroup /run; do grep -q \" $d \" /proc/mounts || echo no=$d; done
        echo shm=$(stat -c %a /dev/shm) tmp=$(stat -c %a /tmp); echo out >/dev/stdout; echo err >/dev/stderr; ls /etc'";
    let output = run(room, "--root root --user ann --net user", script)?;
    output.code(0)?.says(
        "uid=1000(ann) gid=1001(own) groups=27(sudo),106(kvm),1001(own)\nshm=1777 tmp=1777\nout\ngroup\npasswd\nresolv.conf\n",
    )?;
    output.complains("err\n")?;
    let other = "sh -c 'id -G; stat -c %u $(tty); echo typed >$(tty); ls /etc'";
    run(room, "--root root --user ann:106 -t", other)?
        .code(0)?
        .says("106\r\n1000\r\ntyped\r\ngroup   passwd\r\n")?;
    Ok(())
}
