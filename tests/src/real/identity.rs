//! Who the machine says it is: SMBIOS texts in /sys/class/dmi/id, OEM strings, and the driver of the generation ID.

use super::{expect, stock, value};
use crate::harness::{Case, Room, Stop, Verdict};
use crate::initramfs;
use crate::kernels::Flavour;

const SCRIPT: &str = "cd /sys/class/dmi/id
for key in bios_vendor sys_vendor product_name product_version product_serial product_uuid product_family; do
  [ -e $key ] && echo $key=$($B cat $key) || echo $key=-
done
echo oem=$($B tail -c +6 /sys/firmware/dmi/entries/11-0/raw 2>/dev/null | $B tr '\\000' ' ')
echo generation=$([ -e /sys/bus/acpi/devices/QEMUVGID:00 ] && echo there)
echo driver=$($B basename $($B readlink /sys/bus/acpi/devices/QEMUVGID:00/driver) 2>/dev/null)
";

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Flavour::ALL
        .into_iter()
        .map(|flavour| {
            let name = format!("real::identity::said_{}", flavour.name());
            Case::new(name, move |room| said(room, flavour))
        })
        .collect();
    cases.push(Case::new("real::identity::not_said", not_said));
    cases
}

fn run(room: &mut Room<'_>, flavour: Flavour, arguments: &str) -> Result<crate::ground::Output, Stop> {
    let (kernel, initrd) = stock(flavour)?;
    let more = room.dir.join("more.cpio");
    initramfs::write_more(&kernel, &more, "identity", SCRIPT, &["dmi-sysfs"], &[])?;
    let arguments = format!("--initrd {} --cmdline 'quiet test.do=identity' {arguments}", more.display());
    let output = super::boot(room, &kernel.bzimage(), &initrd, &arguments)?;
    output.code(0)?;
    Ok(output)
}

fn said(room: &mut Room<'_>, flavour: Flavour) -> Verdict {
    let uuid = "01234567-89ab-cdef-0123-456789abcdef";
    let arguments = format!(
        "--smbios manufacturer=Maker,product=Thing,version=7.1,serial=S-42,uuid={uuid},family=Things,oem=first,oem=a=b \
         --generation-id"
    );
    let output = run(room, flavour, &arguments)?;
    for (key, wanted) in [
        ("bios_vendor", "Maker"),
        ("sys_vendor", "Maker"),
        ("product_name", "Thing"),
        ("product_version", "7.1"),
        ("product_serial", "S-42"),
        ("product_uuid", uuid),
        ("product_family", "Things"),
        ("oem", "first a=b"),
        ("generation", "there"),
    ] {
        expect(&output, key, wanted)?;
    }
    // Debian's cloud kernel has no driver for it.
    let driver = if flavour == Flavour::Cloud { "" } else { "vmgenid" };
    expect(&output, "driver", driver)
}

/// Whoever says nothing is mayfly, without numbers and without a generation ID.
fn not_said(room: &mut Room<'_>) -> Verdict {
    let output = run(room, Flavour::Generic, "")?;
    for (key, wanted) in [
        ("bios_vendor", "mayfly"),
        ("sys_vendor", "mayfly"),
        ("product_name", "mayfly"),
        ("product_uuid", "-"),
        ("generation", ""),
    ] {
        expect(&output, key, wanted)?;
    }
    let version = value(&output, "product_version")?;
    if version == env!("CARGO_PKG_VERSION") { Ok(()) } else { Err(output.differs("the version of mayfly")) }
}
