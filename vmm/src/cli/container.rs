//! The flags of `mayfly run` that are about a container image.

use base::{Fail, Result, Why};
use clap::{Arg, ArgMatches};

use crate::image::{self, Cache, Found};
use crate::plan::{Command, Container, Root};

/// The flags.
pub fn flags() -> [Arg; 2] {
    [
        Arg::new("image").long("image").value_name("PATH[#NAME]").conflicts_with("root").help(
            "Container image as root: an OCI layout, a docker save archive, a root file system tarball, or one of the cache",
        ),
        Arg::new("entrypoint")
            .long("entrypoint")
            .value_name("PROGRAM")
            .help("Run this program of the image instead of its entrypoint, COMMAND are its arguments"),
    ]
}

/// Takes over the words of the command and, if its root is a container image, what that says; the image is in the cache then, but
/// for a run that is only to be planned.
///
/// # Errors
/// There is no such image, or it cannot be used.
pub fn settle(matches: &ArgMatches, command: &mut Command, words: Vec<String>) -> Result<()> {
    let entrypoint = matches.get_one::<String>("entrypoint").map(String::as_str);
    let Root::Container(container) = &command.root else {
        if entrypoint.is_some() {
            return Err(Fail::new(Why::Usage, "apply --entrypoint")
                .because("there is no image it could be for")
                .hint("pass --image PATH, or the whole command after --"));
        }
        if !words.is_empty() {
            command.argv = words;
        }
        return Ok(());
    };
    let found = find(container)?;
    let execution = found.execution();
    let image = if container.digest.is_empty() { found.reference() } else { container.image.clone() };
    let digest = found.id().map(|id| id.to_string()).unwrap_or_default();
    if !matches.get_flag("dry-run") {
        found.unpack()?;
    }
    // The words of a plan that was written down are whole; those of one for another root are for the image.
    if !words.is_empty() || matches.contains_id("image") || entrypoint.is_some() || command.argv.is_empty() {
        let words = if words.is_empty() { std::mem::take(&mut command.argv) } else { words };
        command.argv = execution.argv(entrypoint, &words);
    }
    super::run::set(matches, "hostname", &mut command.hostname);
    command.root = Root::Container(Container { image, digest });
    command.adopt(&execution);
    Ok(())
}

/// The image of a plan: with a digest, that one and no other.
fn find(container: &Container) -> Result<Found> {
    let cache = Cache::find()?;
    let wanted = container.wanted()?;
    if let Some(there) = wanted.and_then(|wanted| cache.get(wanted)) {
        return Ok(image::kept(there, &cache));
    }
    let found = image::find(&container.image, &cache)?;
    match (wanted, found.id()) {
        (Some(wanted), Some(id)) if wanted != id => {
            Err(Fail::new(Why::Invalid, format!("use image {}", container.image))
                .because(format!("its digest is {id}, and the plan wants {wanted}"))
                .hint("take `digest` out of the plan if the image was changed on purpose"))
        }
        _ => Ok(found),
    }
}
