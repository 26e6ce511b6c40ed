//! Directories of the host, mounted by stock kernels: read, written, and by many at once.

use super::{expect, stock, value};
use crate::harness::{Case, Room, Stop};
use crate::initramfs;
use crate::kernels::Flavour;

/// What a guest mounts and reads. `$S` is the share.
const READS: &str = "$B mkdir /share && $B mount -t virtiofs src /share && echo mounted=yes
S=/share
echo listed=$($B ls $S | $B tr '\\n' ',')
echo many=$($B ls $S/many | $B wc -l),$($B ls -l $S/many | $B grep -c ' 1 ')
echo sum=$($B sha256sum <$S/big | $B cut -c1-64)
echo again=$($B sha256sum <$S/big | $B cut -c1-64)
echo link=$($B readlink $S/link) deep=$($B cat $S/a/b/c/deep)
echo out=$($B cat $S/out 2>&1)
echo up=$($B cat $S/a/../../share/a/b/c/deep)
echo mode=$($B stat -c %a,%u,%g,%s,%Y $S/big)
echo holes=$($B stat -c %b $S/sparse)
echo space=$($B df $S | $B grep -c src)
$B cp $S/busybox /tmp.b; $S/busybox echo run=yes
$B touch $S/new 2>/dev/null || echo refused=new
$B rm $S/big 2>/dev/null || echo refused=$(echo x 2>&1 >$S/big)
$B umount $S && echo unmounted=yes
$B mount -t virtiofs src $S && echo later=$($B cat $S/a/b/c/deep); $B umount $S
";

pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> =
        Flavour::ALL.into_iter().map(|flavour| read_only(flavour, "mmio", "auto")).collect();
    cases.push(read_only(Flavour::Cloud, "pci", "always"));
    cases.push(read_only(Flavour::Cloud, "pci", "never"));
    cases
}

/// A directory in memory: the host's own may be on a file system that knows little.
fn place(room: &mut Room<'_>) -> Result<String, Stop> {
    let made = room.shell("mktemp -d /dev/shm/share.XXXXXX")?;
    made.code(0)?;
    Ok(made.text().trim().to_owned())
}

fn read_only(flavour: Flavour, transport: &'static str, cache: &'static str) -> Case {
    Case::new(format!("real::shares::read_only_{}_{transport}_{cache}", flavour.name()), move |room| {
        let (kernel, initrd) = stock(flavour)?;
        let more = room.dir.join("more.cpio");
        initramfs::write_more(&kernel, &more, "reads-share", READS, &["virtiofs"], &[])?;
        let place = place(room)?;
        let made = room.shell(&format!(
            "cd {place} && mkdir -p a/b/c many && echo by-the-host >a/b/c/deep && ln -s a/b/c/deep link
             ln -s {place}/a/b/c/deep out && cp /bin/busybox . && (cd many && seq 1 3000 | xargs touch)
             head -c 20000003 /dev/urandom >big && chmod 640 big && touch -d @1000000000 big
             truncate -s 1G sparse && sha256sum <big | sed 's/ .*//; s/^/host=/'"
        ))?;
        made.code(0)?;
        let share = format!("--share path={place},tag=src,readonly=on,cache={cache}");
        let output = super::boot(
            room,
            &kernel.bzimage(),
            &initrd,
            &format!(
                "--initrd more.cpio --transport {transport} {share} --cmdline 'quiet test.do=reads-share'"
            ),
        )?;
        let left = room.shell(&format!("cd {place} && find . | wc -l; rm -rf {place}"))?;
        output.code(0)?;
        let sum = value(&made, "host")?;
        for (key, wanted) in [
            ("mounted", "yes"),
            ("listed", "a,big,busybox,link,many,out,sparse,"),
            ("many", "3000,3000"),
            ("sum", &sum),
            ("again", &sum),
            ("link", "a/b/c/deep deep=by-the-host"),
            ("out", "cat: can't open '/share/out': No such file or directory"),
            ("up", "by-the-host"),
            ("mode", "640,0,0,20000003,1000000000"),
            ("holes", "0"),
            ("space", "1"),
            ("run", "yes"),
            ("unmounted", "yes"),
            ("later", "by-the-host"),
        ] {
            expect(&output, key, wanted)?;
        }
        output.mentions("refused=new")?.mentions("Read-only file system")?;
        left.says("3011\n")?;
        Ok(())
    })
}
