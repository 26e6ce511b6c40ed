//! Container images as roots: a layout with layers over one another, what its program finds, and what stays of it.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::expect;
use crate::ground::{Output, quote};
use crate::harness::{Case, Room, Stop, Verdict};
use crate::kernels::{Flavour, Kernel};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("real::containers::layout", layout),
        Case::new("real::containers::root_file_system", root_file_system),
    ]
}

/// What the program of the image says.
const SCRIPT: &str = r#"echo arguments=$*; echo greeting=$GREETING; echo dir=$PWD; echo home=$HOME; echo name=$HOSTNAME
echo user=$(id -u):$(id -g)
echo owned=$(stat -c %u:%g:%a /owned) links=$(stat -c %h /owned) same=$(cat /twin)
echo suid=$(stat -c %u:%a /bin/suid)
echo null=$(stat -c %F:%t:%T /box/null)
echo fifo=$(stat -c %F /box/fifo)
echo large=$(stat -c %u:%g /large)
echo capability=$(/busybox-capable grep CapEff /proc/self/status)
echo gone=$(ls /gone 2>&1 | grep -c 'No such') hidden=$(ls /hidden)
echo link=$(readlink /bin/sh) old=$(stat -c %Y /owned)
echo mine >mine && echo written=$(cat mine)
echo no >/owned 2>/dev/null || echo refused=yes
echo localhost=$(grep -c localhost /etc/hosts)
"#;

/// An archive, written by hand: what is in it needs root to be made, and is not what it was written by.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn add(mut self, kind: u8, name: &str, (mode, uid, gid): (u32, u32, u32), content: &[u8]) -> Self {
        let (name, target) = name.split_once(" -> ").unwrap_or((name, ""));
        let mut header = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        let numbers =
            format!("{mode:07o}\0{uid:07o}\0{gid:07o}\0{:011o}\0{:011o}\0", content.len(), 1_000_000);
        put(100, numbers.as_bytes());
        put(148, b"        ");
        put(156, &[kind]);
        put(157, target.as_bytes());
        put(257, b"ustar\x0000");
        put(329, b"0000001\x000000003\0");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        self.0.extend(header);
        self.0.extend(content);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// A record for the next member.
    fn record(self, key: &str, value: &[u8]) -> Self {
        let rest = key.len() + value.len() + 3;
        let digits = if rest + 2 < 100 { 2 } else { 3 };
        let record = [format!("{} {key}=", rest + digits).as_bytes(), value, b"\n"].concat();
        self.add(b'x', "record", (0, 0, 0), &record)
    }

    fn bytes(mut self) -> Vec<u8> {
        self.0.extend([0; 1024]);
        self.0
    }
}

/// Adds bytes by their digest; their descriptor.
fn blob(files: &mut BTreeMap<String, Vec<u8>>, media: &str, bytes: Vec<u8>) -> Value {
    let hex: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    let descriptor = json!({"mediaType": media, "digest": format!("sha256:{hex}"), "size": bytes.len()});
    files.insert(format!("blobs/sha256/{hex}"), bytes);
    descriptor
}

/// A layout with an image of two layers, called `box:1`.
fn image(busybox: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let applets = ["cat", "id", "ls", "stat", "grep", "readlink"];
    let mut lower = Tar::default()
        .add(b'0', "bin/busybox", (0o755, 0, 0), busybox)
        .add(b'2', "bin/sh -> busybox", (0o777, 0, 0), b"")
        .add(b'0', "bin/suid", (0o4755, 0, 0), b"")
        .add(b'0', "gone", (0o644, 0, 0), b"")
        .add(b'0', "hidden/below", (0o644, 0, 0), b"");
    for applet in applets {
        lower = lower.add(b'1', &format!("bin/{applet} -> bin/busybox"), (0, 0, 0), b"");
    }
    // VFS_CAP_REVISION_2, effective; CAP_NET_RAW is permitted.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let users = b"root:x:0:0::/root:/bin/sh\nann:x:1234:5678::/home/ann:/bin/sh\n";
    let upper = Tar::default()
        .add(b'0', ".wh.gone", (0, 0, 0), b"")
        .add(b'0', "hidden/.wh..wh..opq", (0, 0, 0), b"")
        .add(b'0', "hidden/above", (0o644, 0, 0), b"")
        .add(b'0', "etc/passwd", (0o644, 0, 0), users)
        .add(b'0', "etc/hosts", (0o644, 0, 0), b"")
        .add(b'0', "start", (0o755, 0, 0), SCRIPT.as_bytes())
        .add(b'0', "owned", (0o644, 4321, 8765), b"owned")
        .add(b'1', "twin -> owned", (0, 0, 0), b"")
        .add(b'0', "bin/suid", (0o4755, 0, 0), busybox)
        .add(b'3', "box/null", (0o666, 0, 0), b"")
        .add(b'6', "box/fifo", (0o666, 0, 0), b"")
        .add(b'5', "srv/work", (0o755, 1234, 5678), b"")
        .record("uid", b"3000000")
        .add(b'0', "large", (0o644, 0, 0), b"")
        .record("SCHILY.xattr.security.capability", &capability)
        .add(b'0', "busybox-capable", (0o755, 0, 0), busybox);
    let layers = [lower.bytes(), upper.bytes()];
    let mut files = BTreeMap::new();
    let layer = "application/vnd.oci.image.layer.v1.tar";
    let layers = layers.map(|bytes| blob(&mut files, layer, bytes));
    let config = json!({
        "architecture": "amd64", "os": "linux",
        "config": {
            "Env": ["GREETING=hello", "PATH=/bin"], "User": "ann", "WorkingDir": "/srv/work",
            "Entrypoint": ["/bin/sh", "/start"], "Cmd": ["by", "default"],
        },
        "rootfs": {"type": "layers", "diff_ids": layers.each_ref().map(|layer| layer["digest"].clone())},
    });
    let config =
        blob(&mut files, "application/vnd.oci.image.config.v1+json", config.to_string().into_bytes());
    let manifest = "application/vnd.oci.image.manifest.v1+json";
    let text = json!({"schemaVersion": 2, "mediaType": manifest, "config": config, "layers": layers});
    let mut manifest = blob(&mut files, manifest, text.to_string().into_bytes());
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "box:1"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    files.insert("index.json".into(), index.to_string().into_bytes());
    files.insert("oci-layout".into(), br#"{"imageLayoutVersion": "1.0.0"}"#.to_vec());
    files
}

fn run(room: &mut Room<'_>, flavour: Flavour, arguments: &str) -> Result<Output, Stop> {
    let kernel = Kernel::fetch(flavour).map_err(Stop::Skipped)?;
    let mayfly = quote(&room.mayfly.display().to_string());
    let kernel = quote(&kernel.bzimage().display().to_string());
    let options = room.ground.options();
    room.shell(&format!(
        "XDG_CACHE_HOME=$PWD/cache {mayfly} run {options} --kernel {kernel} --timeout 100s {arguments}"
    ))
}

/// The image's own program, as the image says; then another, from the archive of the layout; the image stays as it is.
fn layout(room: &mut Room<'_>) -> Verdict {
    let busybox = std::fs::read("/bin/busybox").map_err(|cause| format!("read busybox: {cause}"))?;
    std::fs::create_dir_all(room.dir.join("box/blobs/sha256"))
        .map_err(|cause| format!("make a directory: {cause}"))?;
    for (name, bytes) in image(&busybox) {
        room.file(&format!("box/{name}"), bytes)?;
    }
    room.shell("tar -C box -czf box.tar.gz .")?.code(0)?;
    let output = run(room, Flavour::Cloud, "--image box")?;
    output.code(0)?;
    for (key, wanted) in [
        ("arguments", "by default"),
        ("greeting", "hello"),
        ("dir", "/srv/work"),
        ("home", "/home/ann"),
        ("name", "mayfly"),
        ("user", "1234:5678"),
        ("owned", "4321:8765:644 links=2 same=owned"),
        ("suid", "0:4755"),
        ("null", "character special file:1:3"),
        ("fifo", "fifo"),
        ("large", "3000000:0"),
        ("gone", "1 hidden=above"),
        ("link", "busybox old=1000000"),
        ("written", "mine"),
        ("refused", "yes"),
        ("localhost", "2"),
    ] {
        expect(&output, key, wanted)?;
    }
    output.mentions("capability=CapEff: 0000000000002000\n")?;
    let mayfly = quote(&room.mayfly.display().to_string());
    let look = "stat -c '%i %Y %Z %b' cache/mayfly/images/sha256-*/root.ext4";
    let before = room.shell(look)?.code(0)?.text();
    let output = run(
        room,
        Flavour::Generic,
        "--image box.tar.gz#box:1 --entrypoint sh -u 0 -w / -e GREETING=hi --hostname box -- \
         -c 'echo $GREETING $(id -u) $PWD $HOME $HOSTNAME $(ls /srv/work | grep -c .); rm -r /hidden; exit 3'",
    )?;
    output.code(3)?.says("hi 0 / /root box 0\n")?;
    if room.shell(look)?.code(0)?.text() != before {
        return Err("the second run has written to the image".into());
    }
    room.shell(&format!(
        "export XDG_CACHE_HOME=$PWD/cache; {mayfly} image list; {mayfly} image rm box:1 && ls cache/mayfly/images | grep -c . ; \
         ls -A cache/mayfly/images"
    ))?
    .mentions("box:1 ")?
    .mentions("\n0\n.lock\n")
    .map(drop)
}

/// The archive of a root file system with nothing but a program, which has to be named.
fn root_file_system(room: &mut Room<'_>) -> Verdict {
    room.shell("mkdir -p r/bin && cp /bin/busybox r/bin/sh && tar -C r -c . | gzip -1 >r.tar.gz")?.code(0)?;
    run(room, Flavour::Cloud, "--image r.tar.gz")?
        .code(2)?
        .complains("/r.tar.gz: it has neither an entrypoint nor a command, and none was given\n  hint: ")?;
    run(room, Flavour::Cloud, "--image r.tar.gz -- sh -c 'echo all=$(echo /*)'")?
        .code(0)?
        .says("all=/bin /dev /etc /proc /run /sys /tmp\n")
        .map(drop)
}
