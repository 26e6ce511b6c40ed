//! A root file system in one archive, with nothing said of programs.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use base::fail::unreadable;
use base::{Doing, Fail, Result, Why};

use super::{Layer, Recipe, Source};
use crate::image::config::Config;
use crate::image::digest::Digesting;
use crate::image::layer::Form;

/// An archive of files.
pub struct Tarball(PathBuf);

impl Tarball {
    /// The one at a path.
    pub fn new(path: &Path) -> Self {
        Tarball(path.to_owned())
    }

    fn doing(&self) -> String {
        format!("read image {}", self.0.display())
    }

    fn file(&self) -> Result<File> {
        base::host::open_to_read(&self.0).map_err(|cause| unreadable(self.doing(), &self.0, cause))
    }
}

impl Source for Tarball {
    fn choose(&self, name: Option<&str>) -> Result<Recipe> {
        if let Some(name) = name {
            return Err(Fail::new(Why::Usage, format!("find {name} in image {}", self.0.display()))
                .because("it is the archive of a root file system, which has no name")
                .hint(format!("--image {}", self.0.display())));
        }
        let (id, size) = Digesting::new(self.file()?).finish().doing(Why::Host, || self.doing())?;
        let called = crate::quote::line(self.0.file_name().unwrap_or_default().as_encoded_bytes());
        let layer = Layer { place: called.clone(), digest: Some(id), size: Some(size), unpacked: None };
        Ok(Recipe {
            id,
            names: vec![called],
            config: Config::default(),
            layers: vec![layer],
            form: Form::Plain,
        })
    }

    fn open(&self, _: &Layer) -> Result<Box<dyn Read + '_>> {
        Ok(Box::new(self.file()?))
    }
}
