//! Container images: told by what they are, unpacked once, and kept as a file system that guests read.
//!
//! A [`source`] says what an image is made of; its layers, [`tar`] archives, are applied to a [`tree`] in memory; the bytes of files
//! go straight into an [`ext4`] image, which the [`cache`] keeps by the digest. Nothing of an archive ever is a file of the host's.

mod cache;
mod config;
mod decode;
mod digest;
mod ext4;
mod layer;
mod source;
mod tar;
mod tree;

use std::path::{Path, PathBuf, absolute};

use base::{Doing, Fail, Result, Why};

use self::cache::Look;
pub use self::cache::{Cache, Kept};
pub use self::config::Execution;
pub use self::digest::Digest;
use self::source::{Recipe, Source};
use crate::quote;

/// Fewest digits of a digest that name an image.
const DIGITS_MIN: usize = 6;

/// An image that has been found.
pub struct Found {
    cache: Cache,
    /// What it was asked for by.
    label: String,
    kept: Option<Kept>,
    /// Where it comes from, if it is not in the cache, or not known to be.
    from: Option<(Box<dyn Source>, Recipe)>,
    /// The file or directory, and the name in it.
    path: Option<(PathBuf, Option<String>)>,
    /// What the file looked like before anything was read of it.
    look: Option<Look>,
}

/// Finds an image: `PATH`, `PATH#NAME` where there are several in one, or the name or digest of one in the cache. Unpacks nothing.
///
/// # Errors
/// There is no such image, it is for another machine, or it is damaged as far as that was looked at.
pub fn find(reference: &str, cache: &Cache) -> Result<Found> {
    let (path, name) = match reference.rsplit_once('#') {
        Some((path, name)) if !Path::new(reference).exists() => (path, Some(name)),
        _ => (reference, None),
    };
    let doing = || format!("find image {reference}");
    if reference.is_empty() || path.is_empty() {
        return Err(Fail::new(Why::Usage, "find an image: it has no name")
            .hint("name a file or a directory: --image busybox.tar"));
    }
    let label = reference.to_owned();
    let found = Found { cache: cache.clone(), label, kept: None, from: None, path: None, look: None };
    if name.is_none() && !Path::new(path).exists() {
        return match in_cache(path, cache)? {
            Some(kept) => Ok(Found { kept: Some(kept), ..found }),
            None => Err(Fail::new(Why::Missing, doing())
                .because("there is no such file or directory, and no image of that name in the cache")
                .hint("`mayfly image list` tells what is in the cache; nothing is fetched from registries")),
        };
    }
    let path = absolute(path).doing(Why::Usage, doing)?;
    let place = Some((path.clone(), name.map(str::to_owned)));
    if let Some(kept) = cache.recall(&path, name) {
        return Ok(Found { kept: Some(kept), path: place, ..found });
    }
    let look = Look::at(&path);
    let source = source::find(&path)?;
    let mut recipe = source.choose(name)?;
    if recipe.names.is_empty() {
        recipe.names.push(quote::line(path.file_name().unwrap_or_default().as_encoded_bytes()));
    }
    Ok(Found { from: Some((source, recipe)), path: place, look, ..found })
}

/// An image that is in the cache.
pub fn kept(kept: Kept, cache: &Cache) -> Found {
    let label = kept.id.to_string();
    Found { cache: cache.clone(), label, kept: Some(kept), from: None, path: None, look: None }
}

/// An image of the cache, by a name of it or the beginning of its digest.
///
/// # Errors
/// [`Why::Usage`]: several have such a digest.
pub fn in_cache(name: &str, cache: &Cache) -> Result<Option<Kept>> {
    let all: Vec<Kept> = cache.all().into_iter().map(|(kept, _)| kept).collect();
    let called = |kept: &&Kept| kept.names.iter().any(|own| source::is_called(name, own));
    if let Some(kept) = all.iter().find(called) {
        return Ok(Some(kept.clone()));
    }
    let digits = name.strip_prefix("sha256:").unwrap_or(name);
    let fits = |kept: &&Kept| digits.len() >= DIGITS_MIN && kept.id.hex().starts_with(digits);
    let mut fitting = all.iter().filter(fits);
    match (fitting.next(), fitting.next()) {
        (Some(_), Some(_)) => Err(Fail::new(Why::Usage, format!("find image {name}"))
            .because("several images have a digest that begins so")
            .hint("write more of its digits")),
        (one, _) => Ok(one.cloned()),
    }
}

impl Found {
    /// The words it can be found by again, from everywhere.
    pub fn reference(&self) -> String {
        match &self.path {
            Some((path, Some(name))) => format!("{}#{name}", path.display()),
            Some((path, None)) => path.display().to_string(),
            None => self.label.clone(),
        }
    }

    /// Its digest.
    pub fn id(&self) -> Option<Digest> {
        self.kept.as_ref().map(|kept| kept.id).or_else(|| self.from.as_ref().map(|(_, recipe)| recipe.id))
    }

    /// How its program is run.
    pub fn execution(&self) -> Execution {
        let kept = self.kept.as_ref().map(|kept| &kept.execution);
        let from = self.from.as_ref().map(|(_, recipe)| &recipe.config.config);
        kept.or(from).cloned().unwrap_or_default()
    }

    /// Sees to it that it is in the cache, whole.
    ///
    /// # Errors
    /// It is damaged, or the cache cannot be written.
    pub fn unpack(self) -> Result<Kept> {
        let kept = match (self.kept, &self.from) {
            (None, Some((source, recipe))) => match self.cache.get(recipe.id) {
                // Under all of its names already: nothing is written, and no lock taken.
                Some(kept) if recipe.names.iter().all(|name| kept.names.contains(name)) => kept,
                _ => self.cache.fill(&**source, recipe, &self.label)?,
            },
            (Some(kept), _) => kept,
            (None, None) => return Err(Fail::new(Why::Missing, format!("find image {}", self.label))),
        };
        self.cache.touch(&kept);
        if let (Some((path, name)), Some(look)) = (&self.path, self.look) {
            self.cache.remember(path, name.as_deref(), look, kept.id);
        }
        Ok(kept)
    }
}

#[cfg(test)]
mod tests;
