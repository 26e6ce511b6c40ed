//! Consoles of virtio: hvc0 as the kernel's console, and a port that a program finds by its name.

use super::{expect, stock};
use crate::ground::quote;
use crate::harness::{Case, Room, Verdict};
use crate::initramfs;
use crate::kernels::Flavour;

const MODULES: [&str; 1] = ["virtio_console"];
const SCRIPT: &str = "echo from-init >/dev/hvc0
port=$($B grep -l org.mayfly.test /sys/class/virtio-ports/*/name)
echo named=$($B cat $port)
port=/dev/$($B basename $($B dirname $port))
$B head -c 8 $port >/tmp-answer; echo heard=$($B cat /tmp-answer)
echo to-the-host >$port
";

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Flavour::ALL
        .into_iter()
        .map(|flavour| {
            let name = format!("real::consoles::hvc0_and_named_port_{}", flavour.name());
            Case::new(name, move |room| talk(room, flavour, ""))
        })
        .collect();
    cases.push(Case::new("real::consoles::hvc0_and_named_port_cloud_pci", |room| {
        talk(room, Flavour::Cloud, "--transport pci")
    }));
    cases.push(Case::new("real::consoles::panic_on_hvc0_alone", |room| {
        let (kernel, initrd) = with_module(room, Flavour::Cloud, "")?;
        // Nothing on the serial port: the last words come over hvc0 only.
        let output = room.guest(&format!(
            "--kernel {kernel} {initrd} --timeout 240s --serial none --console file=hvc0 \
             --cmdline-only 'console=hvc0 reboot=k panic=-1 pci=off test.do=consoles test.end=panic'"
        ))?;
        output.code(120)?;
        room.shell("cat hvc0")?.mentions("Kernel panic - not syncing: sysrq triggered crash")?;
        Ok(())
    }));
    cases
}

fn with_module(
    room: &mut Room<'_>,
    flavour: Flavour,
    script: &str,
) -> Result<(String, String), crate::harness::Stop> {
    let (kernel, initrd) = stock(flavour)?;
    let more = room.dir.join("more.cpio");
    initramfs::write_more(&kernel, &more, "consoles", script, &MODULES, &[])?;
    let initrds = format!("--initrd {} --initrd more.cpio", initrd.display());
    Ok((kernel.bzimage().display().to_string(), initrds))
}

fn talk(room: &mut Room<'_>, flavour: Flavour, arguments: &str) -> Verdict {
    let (kernel, initrds) = with_module(room, flavour, SCRIPT)?;
    let mayfly = quote(&room.mayfly.display().to_string());
    let options = room.ground.options();
    let output = room.shell(&format!(
        "echo request1 | {mayfly} run {options} --kernel {kernel} {initrds} --timeout 240s {arguments} \
           --serial file=serial --console file=hvc0 --console to=stdio,name=org.mayfly.test \
           --cmdline 'console=hvc0 quiet test.do=consoles'; code=$?
         cat serial hvc0; exit $code"
    ))?;
    output.code(0)?;
    output.mentions("to-the-host")?.mentions("from-init")?;
    expect(&output, "named", "org.mayfly.test")?;
    expect(&output, "heard", "request1")
}
