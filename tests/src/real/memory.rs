//! Memory that guests give back: by reports of what they have freed, and by a balloon. It is measured where it counts, in
//! what the host holds for the process.

use super::{expect, stock, value};
use crate::ground::{Output, quote};
use crate::harness::{Case, Room, Stop, Verdict};
use crate::initramfs;
use crate::kernels::Flavour;

/// What all of them use: `fill MIB FILE`, MiB by their names in `/proc/meminfo`, MiB in the balloon, and whether memory is
/// what was written there.
const WORDS: &str = "$B mkdir -p /fill; $B mount -t tmpfs -o size=100% none /fill
fill() { $B dd if=/dev/zero of=/fill/$2 bs=1M count=$1 2>/dev/null; echo $(($($B stat -c %s /fill/$2) >> 20)); }
mib() { $B awk -v key=$1: '$1 == key {print int($2 / 1024)}' /proc/meminfo; }
balloon() {
  $B awk '/^balloon_inflate/ {n += $2} /^balloon_deflate/ {n -= $2} END {print n / 256}' /proc/vmstat
}
intact() {
  $B yes mayfly | $B head -c 60000000 >/fill/a; $B cp /fill/a /fill/b
  [ $($B stat -c %s /fill/b) = 60000000 ] && $B cmp /fill/a /fill/b && [ $(fill 100 c) = 100 ] && [ $($B tr -d '\\0' </fill/c | $B wc -c) = 0 ] && echo intact=yes
}
";

/// Fills memory and frees it; the host looks before and after. Then uses it again.
const REPORT: &str = "echo filled=$(fill $(($(mib MemAvailable) - 64)) x); read line
$B rm /fill/x; echo freed=yes; read line
intact
";

/// The balloon fills, empties and fills again, the last time with memory that was in use.
const INFLATE: &str = "until [ $(balloon) = 256 ]; do $B usleep 100000; done
echo inflated=yes; half=$(mib MemTotal)
$B rmmod virtio_balloon; echo left_in_it=$(balloon); echo back=$(($(mib MemTotal) - half))
fill $(($(mib MemAvailable) - 32)) x >/dev/null; $B rm /fill/x; echo filled=yes; read line
$B insmod /modules/virtio_balloon.ko
until [ $(balloon) = 256 ]; do $B usleep 100000; done
echo freed=yes; read line
$B rmmod virtio_balloon; intact
";

/// More is needed than the balloon has left.
const OOM: &str = "until [ $(balloon) = 360 ]; do $B usleep 100000; done
echo inflated=yes
echo needed=$(fill 200 x)
";

/// Whether the driver reports free pages, which it accepts by feature 5.
const ACCEPTED: &str = "echo reports=$($B cut -c6 /sys/bus/virtio/drivers/virtio_balloon/virtio*/features)\n";

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Flavour::ALL
        .into_iter()
        .map(|flavour| {
            let name = format!("real::memory::reported_free_pages_{}", flavour.name());
            Case::new(name, move |room| report(room, flavour, "reporting=on", ""))
        })
        .collect();
    cases.push(Case::new("real::memory::reported_free_pages_beside_statistics", |room| {
        report(room, Flavour::Cloud, "reporting=on,stats=1", "--transport pci --cpus 2")
    }));
    for transport in ["mmio", "pci"] {
        cases.push(Case::new(format!("real::memory::balloon_to_half_and_back_{transport}"), move |room| {
            let arguments = format!("--balloon size=256M,stats=1 --transport {transport}");
            let output = watched(room, Flavour::Cloud, &arguments, INFLATE, 200)?;
            expect(&output, "left_in_it", "0")?;
            expect(&output, "back", "256")
        }));
    }
    cases.push(Case::new("real::memory::balloon_gives_way_before_programs_do", |room| {
        let output = plain(room, "--balloon size=360M,deflate_on_oom=on", "", OOM)?;
        expect(&output, "inflated", "yes")?;
        expect(&output, "needed", "200")
    }));
    // A kernel that takes a free page for a zeroed one must not be given a kernel file's bytes in it.
    cases.push(Case::new("real::memory::none_is_reported_by_who_relies_on_it", |room| {
        for (word, wanted) in [("", "1"), ("init_on_free=1", "0")] {
            let output = plain(room, "--balloon reporting=on", word, &format!("{ACCEPTED}intact\n"))?;
            expect(&output, "reports", wanted)?;
            expect(&output, "intact", "yes")?;
        }
        Ok(())
    }));
    cases
}

fn report(room: &mut Room<'_>, flavour: Flavour, balloon: &str, arguments: &str) -> Verdict {
    watched(room, flavour, &format!("--balloon {balloon} {arguments}"), REPORT, 250).map(drop)
}

/// Runs a guest to its end, with `word` on its kernel's command line.
fn plain(room: &mut Room<'_>, arguments: &str, word: &str, script: &str) -> Result<Output, Stop> {
    let (kernel, initrd) = stock(Flavour::Cloud)?;
    let more = room.dir.join("more.cpio");
    initramfs::write_more(&kernel, &more, "memory", &format!("{WORDS}{script}"), &["virtio_balloon"], &[])?;
    let output = room.guest(&format!(
        "--kernel {} --initrd {} --initrd more.cpio --timeout 240s {arguments} --cmdline 'quiet {word} test.do=memory'",
        kernel.bzimage().display(),
        initrd.display()
    ))?;
    output.code(0)?;
    Ok(output)
}

/// Runs a guest that says `filled=` and `freed=`, and goes on at a line each. Demands that the host's memory for it then is
/// `mib` MiB less than before, within 30 seconds, and that the guest's memory works after that.
fn watched(
    room: &mut Room<'_>,
    flavour: Flavour,
    arguments: &str,
    script: &str,
    mib: u64,
) -> Result<Output, Stop> {
    let (kernel, initrd) = stock(flavour)?;
    let more = room.dir.join("more.cpio");
    initramfs::write_more(&kernel, &more, "memory", &format!("{WORDS}{script}"), &["virtio_balloon"], &[])?;
    let mayfly = quote(&room.mayfly.display().to_string());
    let (kernel, initrd, options) = (kernel.bzimage(), initrd.display(), room.ground.options());
    let output = room.shell(&format!(
        "held() {{ awk '/^RssAnon:/ {{print $2}}' /proc/$p/status; }}
         said() {{ until grep -q $1 out || ! kill -0 $p; do sleep 0.1; done; }}
         d=$(mktemp -d /dev/shm/m.XXXXXX); mkfifo $d/in
         {mayfly} run {options} --kernel {} --initrd {initrd} --initrd more.cpio --memory 512M --timeout 100s \
           {arguments} --cmdline 'quiet test.do=memory' <$d/in >out & p=$!
         exec 3>$d/in; rm -r $d
         said filled=; full=$(held); echo >&3; said freed=
         n=0; until [ $(held) -le $((full - {mib} * 1024)) ] || [ $n = 300 ]; do n=$((n + 1)); sleep 0.1; done
         echo full=$full; echo left=$(held); echo >&3
         wait $p; code=$?; cat out; exit $code",
        kernel.display()
    ))?;
    output.code(0)?;
    let number = |key| Ok::<u64, Stop>(value(&output, key)?.parse().unwrap_or(u64::MAX));
    let (full, left) = (number("full")?, number("left")?);
    if full == u64::MAX || left.saturating_add(mib << 10) > full {
        return Err(output.differs(&format!("{mib} MiB less than {full} KiB in the host's memory")));
    }
    expect(&output, "intact", "yes")?;
    Ok(output)
}
