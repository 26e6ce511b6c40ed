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
    for (flavour, transport, cache) in [
        (Flavour::Cloud, "mmio", "auto"),
        (Flavour::Cloud, "pci", "always"),
        (Flavour::Cloud, "pci", "never"),
        (Flavour::Rt, "pci", "auto"),
    ] {
        cases.push(each(flavour, transport, cache));
    }
    cases.push(storm("auto", "--transport mmio"));
    cases.push(storm("always", "--transport pci"));
    cases
}

/// All that programs do to files, once; and a large file that both sides find alike.
fn each(flavour: Flavour, transport: &'static str, cache: &'static str) -> Case {
    Case::new(format!("real::shares::written_{}_{transport}_{cache}", flavour.name()), move |room| {
        let (kernel, initrd) = stock(flavour)?;
        let script = format!(
            "$B mkdir /share && $B mount -t virtiofs share0 /share && /bin/files each /share {cache}
             $B dd if=/dev/urandom of=/share/big bs=1M count=150 2>/dev/null
             echo sum=$($B sha256sum </share/big | $B cut -c1-64); $B cp /share/big /share/copy
             $B umount /share && echo unmounted=yes\n"
        );
        let more = room.dir.join("more.cpio");
        initramfs::write_more(&kernel, &more, "write-share", &script, &["virtiofs"], &["files"])?;
        let place = place(room)?;
        let (kernel, initrd) = (kernel.bzimage(), initrd);
        let arguments = format!(
            "--initrd more.cpio --transport {transport} --share {place},cache={cache} \
             --cmdline 'quiet test.do=write-share'"
        );
        let output = super::boot(room, &kernel, &initrd, &arguments)?;
        let found = room.shell(&format!(
            "cd {place} && for f in big copy; do sha256sum <$f | sed 's/ .*//'; done; cat linked/b
             find . -user 1000 | wc -l; rm -rf {place}"
        ))?;
        output.code(0)?;
        expect(&output, "failed", "0")?;
        expect(&output, "unmounted", "yes")?;
        let sum = value(&output, "sum")?;
        found.says(&format!("{sum}\n{sum}\nshared3\n"))?;
        Ok(())
    })
}

/// Many programs at the same names, which get the errors of any file system and no others.
fn storm(cache: &'static str, arguments: &'static str) -> Case {
    Case::new(format!("real::shares::storm_{cache}"), move |room| {
        let (kernel, initrd) = stock(Flavour::Cloud)?;
        let script = "$B mkdir /share && $B mount -t virtiofs share0 /share && /bin/storm /share 8 300
                      $B umount /share && echo unmounted=yes\n";
        let more = room.dir.join("more.cpio");
        initramfs::write_more(&kernel, &more, "storm-share", script, &["virtiofs"], &["storm"])?;
        let place = place(room)?;
        let arguments = format!(
            "--initrd more.cpio --cpus 2 {arguments} --share {place},cache={cache} --cmdline 'quiet test.do=storm-share'"
        );
        let output = super::boot(room, &kernel.bzimage(), &initrd, &arguments)?;
        let left = room.shell(&format!("ls -A {place} | wc -l; rm -rf {place}"))?;
        output.code(0)?;
        for (key, wanted) in [("errors", "0"), ("done", "2400"), ("cleared", "true"), ("unmounted", "yes")] {
            expect(&output, key, wanted)?;
        }
        left.says("0\n")?;
        Ok(())
    })
}

/// A directory in memory: the host's own may be on a file system that knows little.
fn place(room: &mut Room<'_>) -> Result<String, Stop> {
    let made = room.shell("d=$(mktemp -d /dev/shm/share.XXXXXX) && chmod 755 $d && echo $d")?;
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
