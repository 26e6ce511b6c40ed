//! What `docker save` wrote before it wrote layouts: a `manifest.json` that names the files of each image.

use std::io::Read;

use base::{Fail, Result, Why};
use serde::Deserialize;

use super::files::{Files, Members};
use super::{Layer, Recipe, Source, configuration, document, is_called, layer, parse, proper, undecided};
use crate::image::digest::Digest;
use crate::image::layer::Form;

/// An archive of docker's.
pub struct Docker(Members);

/// One of its images.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Image {
    fn names(&self) -> Vec<String> {
        let id = || self.config.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
        match proper(self.repo_tags.iter().flatten().cloned()) {
            tags if !tags.is_empty() => tags,
            _ => proper([id().get(..12).unwrap_or(id()).to_owned()]),
        }
    }
}

impl Docker {
    /// The images of an archive.
    pub fn new(members: Members) -> Self {
        Docker(members)
    }
}

impl Source for Docker {
    fn choose(&self, name: Option<&str>) -> Result<Recipe> {
        let place = "manifest.json";
        let images: Vec<Image> = parse(&self.0, place, &document(&self.0, place, None)?)?;
        let mut fitting = images
            .iter()
            .filter(|image| name.is_none_or(|name| image.names().iter().any(|own| is_called(name, own))));
        let (Some(image), None) = (fitting.next(), fitting.next()) else {
            let names: Vec<String> = images.iter().flat_map(Image::names).collect();
            return Err(undecided(&self.0.label(), name, &names));
        };
        // Its file is called by its digest, in all versions.
        let called = image.config.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
        let promised = Digest::from_hex(called.strip_prefix("sha256:").unwrap_or(called));
        let bytes = document(&self.0, &image.config, promised)?;
        let (config, unpacked) = configuration(&self.0, &image.config, &bytes, image.layers.len())?;
        if image.layers.is_empty() {
            return Err(
                Fail::new(Why::Invalid, format!("use image {}", self.0.label())).because("it has no layers")
            );
        }
        let layers = image.layers.iter().zip(unpacked).map(|(place, unpacked)| Layer {
            place: place.clone(),
            digest: None,
            size: None,
            unpacked: Some(unpacked),
        });
        Ok(Recipe {
            id: Digest::of(&bytes),
            names: image.names(),
            config,
            layers: layers.collect(),
            form: Form::Layer,
        })
    }

    fn open(&self, of: &Layer) -> Result<Box<dyn Read + '_>> {
        layer(&self.0, of)
    }
}
