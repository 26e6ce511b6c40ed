//! OCI image layouts: an `index.json`, and all else by its digest. OCI image specification, "Image Layout", "Image Index",
//! "Image Manifest"; docker's manifest lists and manifests are the same under other names.

use std::collections::BTreeMap;
use std::io::Read;

use base::{Fail, Result, Why};
use serde::Deserialize;

use super::files::Files;
use super::{Layer, Recipe, Source, configuration, document, is_called, layer, parse, proper, undecided};
use crate::image::digest::Digest;
use crate::image::layer::Form;
use crate::image::tree::shown;
use crate::quote;

const INDEXES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
const MANIFESTS: [&str; 2] =
    ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"];
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
/// Archives; how they are packed, they say themselves.
const LAYERS: [&str; 10] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
];

/// What images are called, in annotations: containerd's whole name, and the specification's.
const NAMES: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];
/// With this annotation a manifest is a note about an image, and none itself.
const NOTE: &str = "vnd.docker.reference.type";
/// Deepest index within an index.
const DEPTH_MAX: usize = 4;

/// A layout.
pub struct Layout(Box<dyn Files>);

#[derive(Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
    platform: Option<Platform>,
}

#[derive(Clone, Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
}

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

impl Descriptor {
    fn names(&self) -> Vec<String> {
        let annotations = self.annotations.as_ref();
        proper(NAMES.iter().filter_map(|name| annotations?.get(*name).cloned()))
    }

    fn is_note(&self) -> bool {
        self.annotations.as_ref().is_some_and(|annotations| annotations.contains_key(NOTE))
            || self.platform.as_ref().is_some_and(|platform| platform.os == "unknown")
    }

    fn fits(&self) -> bool {
        self.platform.as_ref().is_none_or(|found| found.os == "linux" && found.architecture == "amd64")
    }
}

impl Layout {
    /// The layout among these files.
    pub fn new(files: Box<dyn Files>) -> Self {
        Layout(files)
    }

    fn fail(&self, cause: impl Into<String>) -> Fail {
        Fail::new(Why::Invalid, format!("use image {}", self.0.label())).because(cause.into())
    }

    /// The digest of a blob, and its file.
    fn place(&self, of: &Descriptor) -> Result<(Digest, String)> {
        let digest: Digest = of.digest.parse().map_err(|cause: String| self.fail(cause))?;
        Ok((digest, format!("blobs/sha256/{}", digest.hex())))
    }

    fn read<T: serde::de::DeserializeOwned>(&self, of: &Descriptor) -> Result<T> {
        let (digest, place) = self.place(of)?;
        parse(&*self.0, &place, &document(&*self.0, &place, Some(digest))?)
    }

    /// The one of the descriptors that is called so: all of them are for one image if they have the same name or none.
    fn named(&self, all: &[Descriptor], name: Option<&str>) -> Result<Vec<Descriptor>> {
        let called = |of: &Descriptor, name: &str| {
            of.names().iter().any(|own| is_called(name, own)) || of.digest == name
        };
        let fitting: Vec<_> =
            all.iter().filter(|of| name.is_none_or(|name| called(of, name))).cloned().collect();
        let first = fitting.first().map(Descriptor::names);
        match first {
            Some(first) if fitting.iter().all(|of| of.names() == first) => Ok(fitting),
            _ => {
                let text = |of: &Descriptor| of.names().into_iter().next().unwrap_or(of.digest.clone());
                let mut names: Vec<String> = all.iter().map(text).collect();
                names.dedup();
                Err(undecided(&self.0.label(), name, &names))
            }
        }
    }

    /// The manifest for this machine.
    fn manifest(&self, all: &[Descriptor], depth: usize) -> Result<Descriptor> {
        let Some(found) = all.iter().find(|of| of.fits()) else {
            let platforms: Vec<String> = all
                .iter()
                .filter_map(|of| of.platform.as_ref())
                .map(|platform| format!("{}/{}", platform.os, platform.architecture))
                .collect();
            return Err(Fail::new(Why::Unsupported, format!("use image {}", self.0.label()))
                .because(format!("it is for {}", quote::line(platforms.join(", ").as_bytes())))
                .hint("machines here are linux/amd64"));
        };
        if INDEXES.contains(&found.media_type.as_str()) {
            if depth >= DEPTH_MAX {
                return Err(self.fail("its indexes lead from one to the next"));
            }
            let index: Index = self.read(found)?;
            let images: Vec<_> = index.manifests.into_iter().filter(|of| !of.is_note()).collect();
            return self.manifest(&images, depth + 1);
        }
        self.check_type(found, &MANIFESTS)?;
        Ok(found.clone())
    }

    fn check_type(&self, of: &Descriptor, known: &[&str]) -> Result<()> {
        if known.contains(&of.media_type.as_str()) {
            return Ok(());
        }
        let digest = quote::line(of.digest.as_bytes());
        let cause = format!("{digest} has the unknown media type {}", shown(of.media_type.as_bytes()));
        Err(self.fail(cause).hint(format!("known here is {}", known.join(", "))))
    }
}

impl Source for Layout {
    fn choose(&self, name: Option<&str>) -> Result<Recipe> {
        let place = "index.json";
        let index: Index = parse(&*self.0, place, &document(&*self.0, place, None)?)?;
        let images: Vec<_> = index.manifests.into_iter().filter(|of| !of.is_note()).collect();
        let images = self.named(&images, name)?;
        let names = images.first().map(Descriptor::names).unwrap_or_default();
        let manifest: Manifest = self.read(&self.manifest(&images, 0)?)?;
        self.check_type(&manifest.config, &CONFIGS)?;
        let (id, place) = self.place(&manifest.config)?;
        let bytes = document(&*self.0, &place, Some(id))?;
        let (config, unpacked) = configuration(&*self.0, &place, &bytes, manifest.layers.len())?;
        let mut layers = Vec::new();
        for (of, unpacked) in manifest.layers.iter().zip(unpacked) {
            self.check_type(of, &LAYERS)?;
            let (digest, place) = self.place(of)?;
            let digest = Some(digest);
            layers.push(Layer { place, digest, size: Some(of.size), unpacked: Some(unpacked) });
        }
        if layers.is_empty() {
            return Err(self.fail("it has no layers"));
        }
        Ok(Recipe { id, names, config, layers, form: Form::Layer })
    }

    fn open(&self, of: &Layer) -> Result<Box<dyn Read + '_>> {
        layer(&*self.0, of)
    }
}
