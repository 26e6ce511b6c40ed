//! Kernels of packages: pulled through the package manager or given as files, and kept unpacked.

mod apt;
pub mod cache;
mod deb;

use std::path::Path;

use base::{Fail, Result, Why};
use boot::kernel::Kernel;

use self::apt::{Apt, Item};
use self::cache::Package;
pub use self::cache::{Cache, Kept};
use crate::log;

/// Kernels to pull if nobody names one, the first that is known: Debian's for virtual machines, Ubuntu's, and those for any.
const USUAL: [&str; 4] = ["cloud-amd64", "virtual", "amd64", "generic"];

/// The program that pulling needs and that is not installed, if one is missing.
pub fn missing_tool() -> Option<&'static str> {
    apt::TOOLS.into_iter().find(|tool| crate::host::program::in_path(tool).is_none())
}

/// Opens the kernel of a run, as [`Kernel::find`] does. What is unpacked of it is kept for the next run.
///
/// # Errors
/// As there.
pub fn open(path: &Path) -> Result<Kernel> {
    let kernel = Kernel::find(path)?;
    Ok(match cache::home() {
        Ok(home) => kernel.kept_in(home.join("unpacked")),
        Err(_) => kernel,
    })
}

/// The numbers in a name, by which versions are compared: 6.10 is later than 6.9.
pub fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

/// A kernel that was pulled.
pub struct Pulled {
    /// It.
    pub kept: Kept,
    /// It was there before.
    pub known: bool,
}

/// Pulls a kernel: Debian's flavour or release `name`, or the usual one. `told` hears what is about to be fetched.
///
/// # Errors
/// There is no apt here, it knows no such kernel, or it cannot be fetched; the remedy is told.
pub fn pull(cache: &Cache, name: Option<&str>, told: impl FnOnce(&str)) -> Result<Pulled> {
    let names = match name {
        Some(name) => vec![package(name)?],
        None => USUAL.iter().map(|name| package(name)).collect::<Result<Vec<_>>>()?,
    };
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    available()?;
    cache.with_scratch(|scratch| {
        let known = |items: &[Item]| {
            let first = items.first()?;
            cache.kernels().into_iter().find(|kept| kept.pulled && kept.package == first.file)
        };
        let files = match fetch(&names, scratch, |items| known(items).is_some(), told)? {
            Fetched::Files(files) => files,
            Fetched::Known(items) => {
                let kept = known(&items).ok_or_else(|| Fail::new(Why::Host, "find the kernel again"))?;
                return Ok(Pulled { kept, known: true });
            }
        };
        let mut files = files.into_iter();
        let image = files.next().unwrap_or_default();
        let kept = cache.keep(&Package { image, modules: files.collect(), pulled: true })?;
        Ok(Pulled { kept, known: false })
    })
}

/// Fetches and unpacks the kernel `name` into the empty directory `into`; its release. Nothing is kept elsewhere.
///
/// # Errors
/// As [`pull`].
pub fn fetch_into(name: &str, into: &Path) -> Result<String> {
    available()?;
    let scratch = into.join("fetch");
    let making = |cause| Fail::new(Why::Host, format!("make {}", scratch.display())).because(cause);
    std::fs::create_dir(&scratch).map_err(|cause: std::io::Error| making(cause))?;
    let name = package(name)?;
    let files = match fetch(&[&name], &scratch, |_| false, |_| {})? {
        Fetched::Files(files) => files,
        Fetched::Known(_) => Vec::new(),
    };
    let (image, modules) =
        files.split_first().ok_or_else(|| Fail::new(Why::Missing, format!("fetch {name}")))?;
    let release = cache::unpack(image, modules, into)?;
    cache::remove(&scratch)?;
    Ok(release)
}

/// What apt was asked for.
enum Fetched {
    /// It is here: the image first.
    Files(Vec<std::path::PathBuf>),
    /// It need not be fetched.
    Known(Vec<Item>),
}

fn fetch(
    names: &[&str],
    scratch: &Path,
    known: impl Fn(&[Item]) -> bool,
    told: impl FnOnce(&str),
) -> Result<Fetched> {
    let mut told = Some(told);
    let mut tell = |items: &[Item]| {
        if let Some(told) = told.take() {
            let bytes = items.iter().fold(0u64, |sum, item| sum.saturating_add(item.bytes));
            let names: Vec<_> = items.iter().map(|item| item.package.as_str()).collect();
            told(&format!("{} ({} MB)", names.join(", "), bytes.div_ceil(1_000_000)));
        }
    };
    let all = |apt: &Apt, items: &[Item]| {
        items.iter().map(|item| apt.fetch(item, scratch)).collect::<Result<Vec<_>>>()
    };
    let first = |apt: &Apt| -> Result<Option<Vec<Item>>> {
        for name in names {
            if let Some(items) = apt.look(name)? {
                return Ok(Some(items));
            }
        }
        Ok(None)
    };
    let apt = Apt::of_machine(scratch);
    if let Some(items) = first(&apt)? {
        if known(&items) {
            return Ok(Fetched::Known(items));
        }
        tell(&items);
        match all(&apt, &items) {
            Ok(files) => return Ok(Fetched::Files(files)),
            // Lists that are old name what the mirror has no longer.
            Err(fail) => ::log::info!("{}; asking for new package lists", fail.summary()),
        }
    }
    let apt = Apt::of_its_own(scratch).map_err(remedied)?;
    let items = first(&apt)?.ok_or_else(|| {
        remedied(
            Fail::new(Why::Missing, "pull a kernel")
                .because(format!("apt knows no package {}", names.join(" or "))),
        )
    })?;
    if known(&items) {
        return Ok(Fetched::Known(items));
    }
    tell(&items);
    all(&apt, &items).map(Fetched::Files).map_err(remedied)
}

/// The package of a kernel that is named as Debian ends the names of its packages.
fn package(name: &str) -> Result<String> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c);
    if name.is_empty() || name.starts_with(['-', '.', '+']) || !name.chars().all(good) {
        return Err(Fail::new(Why::Usage, format!("pull kernel {name}"))
            .because("that is no name of a package")
            .hint("name what follows `linux-image-`: cloud-amd64, amd64, rt-amd64, 6.1.0-56-amd64"));
    }
    Ok(if name.starts_with("linux-image-") { name.to_owned() } else { format!("linux-image-{name}") })
}

fn available() -> Result<()> {
    match missing_tool() {
        None => Ok(()),
        Some(tool) => Err(Fail::new(Why::Missing, "pull a kernel")
            .because(format!("{tool} is not installed: that is how kernels are pulled"))
            .hint("pass --kernel FILE: an image (vmlinuz) with its modules in /lib/modules, or a package linux-image-VERSION.deb")),
    }
}

fn remedied(fail: Fail) -> Fail {
    Fail::new(fail.why, fail.summary())
        .hint("see whether `apt-get update` works here; or pass --kernel FILE, an image or a package linux-image-VERSION.deb")
}

/// Pulls the usual kernel because there is no other, and says so; its image.
///
/// # Errors
/// As [`pull`].
pub fn pull_for_want(cache: &Cache, why: &str) -> Result<Kept> {
    let tell = |what: &str| {
        log::note(&format!("{why}; fetching {what}, which is kept in {}", cache.dir().display()))
    };
    pull(cache, None, tell).map(|pulled| pulled.kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_named_as_their_packages_end() {
        assert_eq!(package("cloud-amd64").unwrap(), "linux-image-cloud-amd64");
        assert_eq!(package("linux-image-6.1.0-1-amd64").unwrap(), "linux-image-6.1.0-1-amd64");
        for wrong in ["", "-o", "a b", "A", "x=1", "../x", "a/b"] {
            assert_eq!(package(wrong).unwrap_err().why, Why::Usage, "{wrong}");
        }
    }

    #[test]
    fn versions_are_compared_by_their_numbers() {
        assert!(numbers("6.10.0-1") > numbers("6.9.12-3"));
        assert!(numbers("6.1.0-56-amd64") > numbers("6.1.0-9-amd64"));
    }
}
