//! A RAM disk that is not mayfly's own: busybox, a kernel's modules and a script that does what the kernel command
//! line says.

use std::fs;
use std::path::{Path, PathBuf};

use crate::kernels::{Kernel, file_name};

/// Modules for the devices under test, in every flavour. Some have them built in.
const MODULES: [&str; 6] = ["virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "ext4"];

/// What runs as process 1. Each line it says is `key=value`.
const INIT: &str = r#"#!/bin/busybox sh
B=/bin/busybox
$B mkdir -p /proc /sys /dev /disk
$B mount -t proc proc /proc; $B mount -t sysfs sys /sys; $B mount -t devtmpfs dev /dev
for m in $($B cat /modules/order); do $B insmod /modules/$m; done
echo
echo "userspace=yes"
echo "release=$($B uname -r)"
echo "cpus=$($B nproc)"
echo "memory=$($B awk '/MemTotal/{print $2}' /proc/meminfo)"
echo "date=$($B date +%s)"
echo "clocksource=$($B cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
end=poweroff
for word in $($B cat /proc/cmdline); do
  value=${word#*=}
  case $word in
    test.end=*) end=$value;;
    test.do=*) . /do/$value;;
  esac
done
echo "end=$end"
case $end in
  poweroff) $B poweroff -f;;
  reboot) $B reboot -f;;
  panic) echo c > /proc/sysrq-trigger;;
  exit) $B printf '\052' | $B dd of=/dev/port bs=1 seek=244 conv=notrunc;;
  hang) while :; do $B sleep 1000; done;;
  init) exit 0;;
esac
echo "still=here"
$B sleep 1000
"#;

/// What the DHCP client does with what it is given.
const LEASE: &str = "#!/bin/busybox sh
[ \"$1\" = bound ] || exit 0
/bin/busybox ip addr add $ip/$mask dev $interface
/bin/busybox ip route add default via $router
echo nameserver $dns >/etc/resolv.conf
";

/// Pieces of the script, by the word that asks for them.
const DO: &[(&str, &str)] = &[
    ("rng", "echo \"rng=$($B cat /sys/class/misc/hw_random/rng_current) $($B head -c 32 /dev/hwrng | $B wc -c)\""),
    (
        "interrupts",
        "$B head -c 32 /dev/hwrng >/dev/null
         echo vectors=$($B ls /sys/bus/pci/devices/*/msi_irqs 2>/dev/null | $B grep -c '^[0-9]')
         echo handled=$($B awk '/virtio/ {n += $2 + $3} END {print (n > 0) ? \"yes\" : \"no\"}' /proc/interrupts)",
    ),
    (
        "rebind",
        "cd /sys/bus/pci
         for d in devices/*; do [ -e $d/driver ] || continue
           d=$($B basename $d)
           for n in 1 2 3 4 5; do echo $d >drivers/virtio-pci/unbind; echo $d >drivers/virtio-pci/bind; done
           echo 1 >devices/$d/remove
         done
         echo removed=$($B ls /sys/bus/virtio/devices | $B wc -l); echo 1 >rescan
         echo found=$($B ls /sys/bus/virtio/devices | $B wc -l) $($B head -c 32 /dev/hwrng | $B wc -c)
         $B dd if=/dev/vda bs=4k count=1 2>/dev/null | $B sha256sum | $B sed 's/ .*//; s/^/sum=/'; cd /",
    ),
    ("read", "echo ready; read line; echo \"line=$line\""),
    ("flood", "$B seq 1 1500; echo flood=done"),
    (
        "disk",
        "$B mount -t ext4 /dev/vda /disk && echo mounted=$($B cat /disk/given)
         $B dd if=/dev/urandom of=/disk/written bs=64k count=64 2>/dev/null
         echo sum=$($B sha256sum < /disk/written | $B cut -c1-64); $B sync
         $B umount /disk && $B mount -t ext4 /dev/vda /disk && echo again=$($B sha256sum < /disk/written | $B cut -c1-64)
         $B fstrim /disk && echo trimmed=yes
         $B umount /disk && echo unmounted=yes",
    ),
    // Files written over and over, removed, cut and written again, each with its sum; all of them looked at after the
    // file system has been away.
    (
        "churn",
        "$B mount -t ext4 /dev/vda /disk && echo mounted=$($B cat /disk/given); cd /disk
         for round in 1 2 3; do
           for n in 1 2 3 4 5 6 7 8; do
             $B dd if=/dev/urandom of=f$n bs=$((n * 1000)) count=$((round * 40)) conv=notrunc 2>/dev/null
             $B dd if=/dev/urandom of=f$n bs=4096 count=3 seek=$((n + round)) conv=notrunc,fsync 2>/dev/null
           done
           $B rm -f f$round; $B truncate -s 12345 f$((round + 3)); $B sync; $B fstrim /disk && trimmed=yes
         done
         $B sha256sum f* >sums; cd /; $B umount /disk
         $B mount -t ext4 /dev/vda /disk && cd /disk && $B sha256sum -c sums >/dev/null && echo intact=$($B wc -l <sums)
         echo sums=$($B sha256sum <sums | $B cut -c1-64); echo trimmed=$trimmed; cd /; $B umount /disk && echo unmounted=yes",
    ),
    // What is said to be synced has to be there whatever happens now.
    (
        "synced",
        "$B mount -t ext4 /dev/vda /disk
         $B dd if=/dev/urandom of=/disk/kept bs=64k count=40 conv=fsync 2>/dev/null
         echo synced=$($B sha256sum </disk/kept | $B cut -c1-64)
         n=0; while :; do n=$((n + 1)); $B dd if=/dev/urandom of=/disk/more bs=64k count=20 2>/dev/null; done",
    ),
    ("root", "$B mount -t ext4 /dev/vda /disk && $B mount --move /dev /disk/dev && exec $B switch_root /disk /sbin-init"),
    (
        "nat",
        "$B ip link set lo up; $B ip link set eth0 up; $B mkdir -p /etc
         $B udhcpc -q -n -i eth0 -s /bin/lease >/dev/null 2>&1
         echo address=$($B ip -4 addr show dev eth0 | $B awk '/inet/{print $2}'); echo resolver=$($B cat /etc/resolv.conf)
         H=http://10.0.2.2:8000
         echo down=$($B wget -q -O - $H/data | $B sha256sum | $B cut -c1-64)
         n=0; while [ $n -lt 40 ]; do n=$((n+1)); $B wget -q -O - $H/small | $B sha256sum >/tmp.$n & done; wait
         echo many=$($B cat /tmp.* | $B sort | $B uniq -c | $B awk '{print $1}')
         until $B ip -6 addr show dev eth0 scope global | $B grep -v tentative | $B grep -q fd6d; do $B usleep 100000; done
         echo v6=$($B wget -q -O - http://[fd6d:6179:666c:7900::2]:8000/small | $B sha256sum | $B cut -c1-64)
         echo ping=$($B ping -c 1 10.0.2.2 >/dev/null && echo yes)
         $B nc -l -p 80 < /init && echo served=yes
         $B wget -q -O /up $H/data && $B nc 10.0.2.2 8001 < /up && echo up=sent",
    ),
    (
        "tap",
        "$B ip addr add 192.168.77.2/24 dev eth0; $B ip link set eth0 up
         until $B wget -q -O /up http://192.168.77.1:8000/data; do $B usleep 200000; done
         echo down=$($B sha256sum < /up | $B cut -c1-64)
         $B nc 192.168.77.1 8001 < /up && echo up=sent
         echo queues=$($B ls -d /sys/class/net/eth0/queues/rx-* | $B wc -l)",
    ),
    (
        "disks",
        "echo sizes=$($B cat /sys/block/vda/size),$($B cat /sys/block/vdb/size)
         echo ro=$($B cat /sys/block/vda/ro),$($B cat /sys/block/vdb/ro)
         echo serial=$($B cat /sys/block/vda/serial)
         $B dd if=/dev/zero of=/dev/vdb bs=4k count=1 2>/dev/null || echo refused=yes",
    ),
];

/// Writes a RAM disk to `path` that says the mark of the benchmarks and powers off, and does nothing else.
///
/// # Errors
/// busybox is missing, or the host refuses.
pub fn write_mark(path: &Path) -> Result<(), String> {
    const INIT: &str = "#!/bin/busybox sh\necho userspace=yes\nexec /bin/busybox poweroff -f\n";
    let mut archive = Archive::default();
    for dir in ["bin", "dev"] {
        archive.add(dir, 0o040_755, (0, 0), b"");
    }
    archive.add("dev/console", 0o020_600, (5, 1), b"");
    archive.add("init", 0o100_755, (0, 0), INIT.as_bytes());
    archive.add("bin/busybox", 0o100_755, (0, 0), &busybox()?);
    archive.add("TRAILER!!!", 0, (0, 0), b"");
    fs::write(path, archive.bytes).map_err(|cause| format!("write {}: {cause}", path.display()))
}

/// Writes a root to `path` in which there is nothing but busybox, under the names `programs`.
///
/// # Errors
/// busybox is missing, or the host refuses.
pub fn write_root(path: &Path, programs: &str) -> Result<(), String> {
    let mut archive = Archive::default();
    archive.add("bin", 0o040_755, (0, 0), b"");
    archive.add("bin/busybox", 0o100_755, (0, 0), &busybox()?);
    for name in programs.split_ascii_whitespace() {
        archive.add(&format!("bin/{name}"), 0o120_777, (0, 0), b"busybox");
    }
    archive.add("TRAILER!!!", 0, (0, 0), b"");
    fs::write(path, archive.bytes).map_err(|cause| format!("write {}: {cause}", path.display()))
}

fn busybox() -> Result<Vec<u8>, String> {
    fs::read("/bin/busybox").map_err(|cause| format!("read /bin/busybox (package busybox-static): {cause}"))
}

/// Writes the RAM disk for `kernel` to `path`: a cpio archive, not compressed.
///
/// # Errors
/// busybox or a module is missing, or the host refuses.
pub fn write(kernel: &Kernel, path: &Path) -> Result<(), String> {
    let busybox = busybox()?;
    let modules = kernel.modules(&MODULES)?;
    let order: Vec<String> = modules.iter().map(|module| file_name(module)).collect();
    let mut archive = Archive::default();
    for dir in ["bin", "modules", "do", "dev"] {
        archive.add(dir, 0o040_755, (0, 0), b"");
    }
    // Without it the kernel opens no console for process 1.
    archive.add("dev/console", 0o020_600, (5, 1), b"");
    archive.add("init", 0o100_755, (0, 0), INIT.as_bytes());
    archive.add("bin/busybox", 0o100_755, (0, 0), &busybox);
    archive.add("bin/lease", 0o100_755, (0, 0), LEASE.as_bytes());
    archive.add("modules/order", 0o100_644, (0, 0), order.join("\n").as_bytes());
    for (word, script) in DO {
        archive.add(&format!("do/{word}"), 0o100_644, (0, 0), script.as_bytes());
    }
    for (module, name) in modules.iter().zip(&order) {
        let bytes = fs::read(module).map_err(|cause| format!("read {}: {cause}", module.display()))?;
        archive.add(&format!("modules/{name}"), 0o100_644, (0, 0), &bytes);
    }
    archive.add("TRAILER!!!", 0, (0, 0), b"");
    fs::write(path, archive.bytes).map_err(|cause| format!("write {}: {cause}", path.display()))
}

/// Writes a RAM disk to `path` that adds to the one of [`write`] what some cases need: a script for the word `word`
/// behind `test.do=`, which finds the modules `modules` loaded and the programs of this crate in `/bin`.
///
/// # Errors
/// A module or a program is missing, or the host refuses.
pub fn write_more(
    kernel: &Kernel,
    path: &Path,
    word: &str,
    script: &str,
    modules: &[&str],
    programs: &[&str],
) -> Result<(), String> {
    let read = |path: &Path| fs::read(path).map_err(|cause| format!("read {}: {cause}", path.display()));
    let mut archive = Archive::default();
    let mut load = String::new();
    for module in kernel.modules(modules)? {
        let name = file_name(&module);
        archive.add(&format!("modules/{name}"), 0o100_644, (0, 0), &read(&module)?);
        // It may be there already.
        load.push_str(&format!("$B insmod /modules/{name} 2>/dev/null\n"));
    }
    for program in programs {
        archive.add(&format!("bin/{program}"), 0o100_755, (0, 0), &read(&program_path(program)?)?);
    }
    archive.add(&format!("do/{word}"), 0o100_644, (0, 0), format!("{load}{script}").as_bytes());
    archive.add("TRAILER!!!", 0, (0, 0), b"");
    fs::write(path, archive.bytes).map_err(|cause| format!("write {}: {cause}", path.display()))
}

/// Writes a RAM disk to `path` that adds the file `name` at its top.
///
/// # Errors
/// The host refuses.
pub fn write_file(path: &Path, name: &str, bytes: &[u8]) -> Result<(), String> {
    let mut archive = Archive::default();
    archive.add(name, 0o100_644, (0, 0), bytes);
    archive.add("TRAILER!!!", 0, (0, 0), b"");
    fs::write(path, archive.bytes).map_err(|cause| format!("write {}: {cause}", path.display()))
}

/// Where cargo has put a program of this crate: beside this one, or one directory above where this one is a test.
///
/// # Errors
/// It is not there.
pub fn program_path(name: &str) -> Result<PathBuf, String> {
    let me = std::env::current_exe().map_err(|cause| format!("find this program: {cause}"))?;
    let places = me.ancestors().skip(1).take(2).map(|place| place.join(name));
    places.into_iter().find(|path| path.exists()).ok_or_else(|| format!("find the program {name}"))
}

/// A cpio archive of the `newc` form (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    files: usize,
}

impl Archive {
    fn add(&mut self, name: &str, mode: usize, device: (usize, usize), data: &[u8]) {
        self.files += 1;
        // Inode, mode, owner, group, links, time, size, device of the file, device it is, length of the name, sum.
        let fields = [self.files, mode, 0, 0, 1, 0, data.len(), 0, 0, device.0, device.1, name.len() + 1, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_are_aligned() {
        let mut archive = Archive::default();
        archive.add("a", 0o100_644, (0, 0), b"12345");
        archive.add("TRAILER!!!", 0, (0, 0), b"");
        assert_eq!(archive.bytes.len() % 4, 0);
        assert!(archive.bytes.starts_with(b"070701000000010000"));
    }
}
