//! Where images come from: layouts, archives of layouts, what docker saves, root file systems.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::image::source::{self, Recipe};
use crate::image::{Cache, Digest, find};

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A layout that a test writes by hand.
#[derive(Clone, Default)]
pub(super) struct Layout {
    pub(super) files: BTreeMap<String, Vec<u8>>,
    manifests: Vec<Value>,
}

impl Layout {
    /// Adds bytes by their digest; their descriptor.
    fn blob(&mut self, media: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        self.files.insert(format!("blobs/sha256/{}", digest.hex()), bytes.to_vec());
        json!({"mediaType": media, "digest": digest.to_string(), "size": bytes.len()})
    }

    /// The configuration and the layers of an image.
    fn parts(&mut self, layers: &[Vec<u8>], config: &Value) -> (Value, Vec<Value>) {
        let diffs: Vec<_> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": config, "rootfs": {"type": "layers", "diff_ids": diffs},
        });
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let layers = layers.iter().map(|layer| self.blob(LAYER, &gzip(layer))).collect();
        (config, layers)
    }

    /// Adds an image; its descriptor.
    fn image(&mut self, layers: &[Vec<u8>], config: &Value) -> Value {
        let (config, layers) = self.parts(layers, config);
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": layers});
        self.blob(MANIFEST, manifest.to_string().as_bytes())
    }

    /// Adds an image with a name, for everyone.
    pub(super) fn named(mut self, name: &str, layers: &[Vec<u8>], config: &Value) -> Self {
        let mut image = self.image(layers, config);
        if !name.is_empty() {
            image["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        }
        self.manifests.push(image);
        self
    }

    /// Its files, the index among them.
    pub(super) fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let mut files = self.files.clone();
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        files.insert("index.json".into(), index.to_string().into_bytes());
        files.insert("oci-layout".into(), br#"{"imageLayoutVersion": "1.0.0"}"#.to_vec());
        files
    }

    pub(super) fn write(&self, dir: &Path) -> PathBuf {
        for (name, bytes) in self.files() {
            let path = dir.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        dir.to_owned()
    }
}

fn archive(files: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    let add = |tar: Tar, (name, bytes): (&String, &Vec<u8>)| tar.add(b'0', name, (0o644, 0, 0), bytes);
    files.iter().fold(Tar::default().directory("./").directory("./blobs/"), add).bytes()
}

pub(super) fn layer(name: &str) -> Vec<u8> {
    Tar::default().file(name, name).bytes()
}

fn recipe(path: &Path, name: Option<&str>) -> base::Result<Recipe> {
    source::find(path)?.choose(name)
}

fn told(path: &Path, name: Option<&str>) -> String {
    let dir = path.parent().unwrap().display().to_string();
    recipe(path, name).map(drop).expect_err("it was taken").to_string().replace(&dir, "D")
}

fn config() -> Value {
    json!({"Env": ["A=1"], "User": "ann", "WorkingDir": "/w", "Entrypoint": ["/e"], "Cmd": null})
}

/// An image of two layers as others write it, without a runtime: the layers packed, the configuration by its digest (crane),
/// or by a plain name (jib).
fn packed_archive(parts: &Layout, config: &str, digest: &str) -> Vec<u8> {
    let packed = ["3", "4"].map(|digit| format!("{}.tar.gz", digit.repeat(64)));
    let manifest = json!([{"Config": config, "RepoTags": ["busybox:1.36"], "Layers": packed}]);
    Tar::default()
        .add(b'0', config, (0o644, 0, 0), &parts.files[&format!("blobs/sha256/{digest}")])
        .add(b'0', &packed[0], (0o644, 0, 0), &gzip(&layer("a")))
        .add(b'0', &packed[1], (0o644, 0, 0), &gzip(&layer("b")))
        .add(b'0', "manifest.json", (0o644, 0, 0), manifest.to_string().as_bytes())
        .bytes()
}

#[test]
fn an_image_is_the_same_in_every_form() {
    let dir = tempfile::tempdir().unwrap();
    let layers = [layer("a"), layer("b")];
    let layout = Layout::default().named("busybox:1.36", &layers, &config());
    let put = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    // As docker wrote it before layouts; the second layer is a link, as it was for one that images share.
    let mut parts = Layout::default();
    let (config_at, _) = parts.parts(&layers, &config());
    let digest = config_at["digest"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
    let id = "0".repeat(64);
    let json_name = format!("{digest}.json");
    let manifest = json!([{
        "Config": json_name, "RepoTags": ["busybox:1.36"], "Layers": [format!("{id}/layer.tar"), format!("{}/layer.tar", "1".repeat(64))],
    }]);
    let docker = Tar::default()
        .add(
            b'0',
            &format!("{}.json", &digest[..64]),
            (0o644, 0, 0),
            &parts.files[&format!("blobs/sha256/{digest}")],
        )
        .directory(&id)
        .add(b'0', &format!("{id}/layer.tar"), (0o644, 0, 0), &layers[0])
        .add(b'0', &format!("{}.tar", "2".repeat(64)), (0o644, 0, 0), &layers[1])
        .link(&format!("{}/layer.tar -> ../{}.tar", "1".repeat(64), "2".repeat(64)))
        .add(b'0', "manifest.json", (0o644, 0, 0), manifest.to_string().as_bytes())
        .bytes();
    // As it writes now: both at once.
    let mut both = layout.files();
    both.insert("manifest.json".into(), b"[]".to_vec());
    let wanted = recipe(&layout.write(&dir.path().join("layout")), None).unwrap();
    assert_eq!((wanted.layers.len(), wanted.config.config.user.as_str()), (2, "ann"));
    assert_eq!(wanted.config.config.cmd, Vec::<String>::new());
    for (name, bytes) in [
        ("layout.tar", archive(&layout.files())),
        ("layout.tar.gz", gzip(&archive(&layout.files()))),
        ("docker.tar", docker.clone()),
        ("docker.tgz", gzip(&docker)),
        ("both.tar", archive(&both)),
        ("crane.tar", packed_archive(&parts, &format!("sha256:{digest}"), &digest)),
        ("jib.tar", packed_archive(&parts, "config.json", &digest)),
    ] {
        let path = put(name, &bytes);
        let source = source::find(&path).unwrap();
        let found = source.choose(None).unwrap();
        assert_eq!(
            (found.id, &found.names, &found.config),
            (wanted.id, &wanted.names, &wanted.config),
            "{name}"
        );
        let cache = Cache::at(&dir.path().join("cache").join(name));
        cache.fill(&*source, &found, name).unwrap();
        assert!(
            source.choose(Some("busybox:1.36")).is_ok()
                && source.choose(Some("docker.io/library/busybox:1.36")).is_ok()
        );
    }
    let root = put("root.tar", &layers[0]);
    let found = recipe(&root, None).unwrap();
    assert_eq!((found.id, found.form), (Digest::of(&layers[0]), Form::Plain));
    assert_eq!(
        told(&root, Some("x")),
        "find x in image D/root.tar: it is the archive of a root file system, which has no name\n  hint: --image D/root.tar"
    );
}

#[test]
fn one_of_several_is_chosen_by_name_and_for_this_machine() {
    let dir = tempfile::tempdir().unwrap();
    let mut layout =
        Layout::default().named("a:1", &[layer("a")], &config()).named("b:latest", &[layer("b")], &config());
    let images: Vec<Value> = ["arm64", "amd64"]
        .map(|machine| {
            let mut image = layout.image(&[layer(machine)], &json!({"User": machine}));
            image["platform"] = json!({"os": "linux", "architecture": machine});
            image
        })
        .to_vec();
    let mut note = images[1].clone();
    note["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    note["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    let all = json!({"schemaVersion": 2, "manifests": [note, images[0], images[1]]});
    let mut index = layout.blob(INDEX, all.to_string().as_bytes());
    index["annotations"] = json!({"io.containerd.image.name": "docker.io/library/multi:2"});
    layout.manifests.push(index);
    let mut foreign = images[0].clone();
    foreign["annotations"] = json!({"org.opencontainers.image.ref.name": "foreign"});
    layout.manifests.push(foreign);
    let path = layout.write(&dir.path().join("l"));
    assert_eq!(recipe(&path, Some("multi:2")).unwrap().config.config.user, "amd64");
    assert!(recipe(&path, Some("b")).is_ok(), "latest is what is meant without a tag");
    assert_eq!(
        told(&path, None),
        "choose an image of D/l: it has several: a:1, b:latest, docker.io/library/multi:2, foreign\n  hint: --image D/l#a:1"
    );
    assert_eq!(
        told(&path, Some("c")),
        "find c in image D/l: it has a:1, b:latest, docker.io/library/multi:2, foreign\n  hint: --image D/l#a:1"
    );
    assert_eq!(
        told(&path, Some("foreign")),
        "use image D/l: it is for linux/arm64\n  hint: machines here are linux/amd64"
    );
    // The words of the command line.
    let cache = Cache::at(&dir.path().join("cache"));
    assert!(find(&format!("{}#a:1", path.display()), &cache).is_ok());
    let missing = find("nowhere.tar", &cache).map(drop).unwrap_err().to_string();
    assert!(
        missing.starts_with("find image nowhere.tar: there is no such file or directory, and no image"),
        "{missing}"
    );
}

#[test]
fn what_is_not_what_it_says_is_refused_with_file_and_digest() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::default().named("a", &[layer("a"), layer("b")], &config());
    let names: Vec<String> = layout.files.keys().cloned().collect();
    let mut number = 0;
    let mut attempt = |files: &Layout| {
        number += 1;
        let path = files.write(&dir.path().join(number.to_string()));
        let cache = Cache::at(&dir.path().join("cache"));
        let text = find(path.to_str().unwrap(), &cache)
            .and_then(|found| found.unpack())
            .expect_err("it was taken")
            .to_string();
        assert_eq!(cache.all(), [], "nothing is kept");
        assert!(!dir.path().join("cache/.new").exists(), "nothing is left");
        text.replace(&path.display().to_string(), "IMAGE")
    };
    for name in &names {
        let hex = name.rsplit('/').next().unwrap();
        for (what, change) in [
            (
                "bent",
                Box::new(|bytes: &mut Vec<u8>| *bytes.last_mut().unwrap() ^= 1) as Box<dyn Fn(&mut Vec<u8>)>,
            ),
            ("cut", Box::new(|bytes: &mut Vec<u8>| bytes.truncate(bytes.len() - 1))),
            ("grown", Box::new(|bytes: &mut Vec<u8>| bytes.push(0))),
            ("emptied", Box::new(Vec::clear)),
        ] {
            let mut bad = layout.clone();
            change(bad.files.get_mut(name).unwrap());
            let text = attempt(&bad);
            assert!(text.contains("IMAGE") && text.contains(hex), "{what}: {text}");
            assert!(text.contains("was promised") || text.contains("were promised"), "{what}: {text}");
        }
        let mut bad = layout.clone();
        bad.files.remove(name);
        let path = bad.write(&dir.path().join(format!("without-{hex}")));
        let cache = Cache::at(&dir.path().join("cache"));
        let text = find(path.to_str().unwrap(), &cache)
            .and_then(|found| found.unpack())
            .expect_err("it was taken")
            .to_string();
        assert!(text.contains(hex) && text.contains(": it is not there"), "{text}");
    }
}

#[test]
fn what_nobody_knows_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut number = 0;
    let mut attempt = |layout: &Layout| {
        number += 1;
        let path = layout.write(&dir.path().join(number.to_string()));
        recipe(&path, None)
            .map(drop)
            .expect_err("it was taken")
            .to_string()
            .replace(&path.display().to_string(), "IMAGE")
    };
    let mut strange = Layout::default();
    let (config_at, mut layers) = strange.parts(&[layer("a")], &config());
    layers[0]["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar+encrypted");
    let manifest = json!({"config": config_at, "layers": layers});
    let manifest = strange.blob(MANIFEST, manifest.to_string().as_bytes());
    strange.manifests.push(manifest);
    let text = attempt(&strange);
    let digest = layers[0]["digest"].as_str().unwrap();
    assert!(
        text.starts_with(&format!("use image IMAGE: {digest} has the unknown media type `application/vnd.oci.image.layer.v1.tar+encrypted`")),
        "{text}"
    );
    let mut foreign = Layout::default().named("a", &[], &config());
    assert_eq!(attempt(&foreign), "use image IMAGE: it has no layers");
    foreign.manifests[0]["digest"] = json!("sha512:00");
    assert!(attempt(&foreign).contains("`sha512:00` is no digest"));
    let mut circle = Layout::default();
    let mut inner = json!({"manifests": []});
    for _ in 0..6 {
        let index = circle.blob(INDEX, inner.to_string().as_bytes());
        inner = json!({"manifests": [index]});
    }
    circle.manifests = inner["manifests"].as_array().unwrap().clone();
    assert!(attempt(&circle).contains("its indexes lead from one to the next"));
    assert!(attempt(&Layout::default()).contains("there is no image for a machine in it"));
    for (files, told) in [
        (&[("index.json", "{")][..], "read index.json of image IMAGE: EOF"),
        (&[("index.json", r#"{"manifests": 1}"#)], "read index.json of image IMAGE: invalid type"),
        (&[("other", "")], "it is a directory without an index.json, so no OCI image layout"),
    ] {
        let place = tempfile::tempdir().unwrap();
        files.iter().for_each(|(name, text)| std::fs::write(place.path().join(name), text).unwrap());
        let text = recipe(place.path(), None).map(drop).unwrap_err().to_string();
        assert!(text.replace(place.path().to_str().unwrap(), "IMAGE").contains(told), "{text}");
    }
    let junk = dir.path().join("junk");
    std::fs::write(&junk, "no image").unwrap();
    assert!(told(&junk, None).starts_with("read image D/junk: it is no archive"));
    assert!(told(&dir.path().join("none"), None).starts_with("read image D/none: No such file"));
}

/// What an image says of itself is shown on terminals.
#[test]
fn no_name_of_an_image_commands_a_terminal() {
    let dir = tempfile::tempdir().unwrap();
    let bad = "a\u{1b}[2Jb\nerror: c";
    let layout = Layout::default().named(bad, &[layer("a")], &config());
    let path = layout.write(&dir.path().join("one"));
    assert_eq!(recipe(&path, None).unwrap().names, Vec::<String>::new());
    let cache = Cache::at(&dir.path().join("cache"));
    let kept = find(path.to_str().unwrap(), &cache).unwrap().unpack().unwrap();
    assert_eq!(kept.names, ["one"], "that of the file, which the user gave");
    let mut foreign = layout.clone();
    foreign.manifests[0]["platform"] = json!({"os": bad, "architecture": "d"});
    let text = told(&foreign.write(&dir.path().join("foreign")), None);
    assert!(text.starts_with("use image D/foreign: it is for a[2Jb error: c/d\n"), "{text:?}");

    let docker = |image: Value| {
        let manifest =
            BTreeMap::from([("manifest.json".to_owned(), json!([image]).to_string().into_bytes())]);
        let path = dir.path().join("docker.tar");
        std::fs::write(&path, archive(&manifest)).unwrap();
        path
    };
    let path = docker(json!({"Config": bad, "RepoTags": [bad, "good:1", "x".repeat(300)], "Layers": []}));
    assert_eq!(told(&path, None), "read a[2Jb error: c of image D/docker.tar: it is not there");
    assert!(told(&path, Some("none")).contains(": it has good:1\n"), "{}", told(&path, Some("none")));
}
