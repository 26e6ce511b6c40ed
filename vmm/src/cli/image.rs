//! `mayfly image`: what is in the cache of container images.

use std::time::{Duration, SystemTime};

use base::{Fail, Result, Why};
use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint, value_parser};
use serde_json::json;

use super::{complain, say};
use crate::image::{self, Cache, Kept};
use crate::outcome::{code, code_before_start};
use crate::plan::Period;

/// Adds the commands.
pub fn commands(image: Command) -> Command {
    let json = || Arg::new("json").long("json").action(ArgAction::SetTrue).help("Print JSON");
    image
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            Command::new("list")
                .visible_alias("ls")
                .about("List the images, the last used first")
                .arg(json()),
        )
        .subcommand(
            Command::new("load")
                .about("Unpack images now, so that runs need not, and their sources can go")
                .arg(
                    Arg::new("image")
                        .required(true)
                        .num_args(1..)
                        .value_name("PATH[#NAME]")
                        .value_hint(ValueHint::FilePath)
                        .help("OCI image layout, docker save archive, or archive of a root file system"),
                )
                .arg(json()),
        )
        .subcommand(
            Command::new("rm")
                .about("Remove images")
                .arg(
                    Arg::new("image")
                        .num_args(0..)
                        .value_name("NAME")
                        .help("Name of an image, or its digest"),
                )
                .arg(
                    Arg::new("all")
                        .long("all")
                        .action(ArgAction::SetTrue)
                        .conflicts_with_all(["image", "unused"])
                        .help("Remove all images that no machine runs on"),
                )
                .arg(
                    Arg::new("unused")
                        .long("unused")
                        .value_name("TIME")
                        .value_parser(value_parser!(Period))
                        .conflicts_with("image")
                        .help("Remove the images that have not been used for this time, such as 720h"),
                ),
        )
}

/// Carries out `mayfly image`; its exit code.
pub fn image(matches: &ArgMatches) -> u8 {
    let done = Cache::find().and_then(|cache| match matches.subcommand() {
        Some(("list", matches)) => Ok(list(&cache, matches.get_flag("json"))),
        Some(("load", matches)) => load(&cache, matches),
        Some(("rm", matches)) => remove(&cache, matches),
        _ => Ok(String::new()),
    });
    match done {
        Ok(text) if text.is_empty() => code::DONE,
        Ok(text) => say(&text),
        Err(fail) => {
            complain(&fail);
            code_before_start(&fail)
        }
    }
}

fn list(cache: &Cache, json: bool) -> String {
    let all = cache.all();
    if json {
        let rows: Vec<_> = all.iter().map(|(kept, used)| object(cache, kept, *used)).collect();
        return format!("{}\n", json!(rows));
    }
    let row = |name: &str, digest: &str, size: &str, used: &str| {
        format!("{name:<40}  {digest:<12}  {size:>9}  {used}\n")
    };
    let mut text = row("NAME", "DIGEST", "SIZE", "USED");
    for (kept, used) in &all {
        let used = if cache.is_running(kept.id) { "now".to_owned() } else { ago(*used) };
        let digest = kept.id.hex();
        let digest = digest.get(..12).unwrap_or_default();
        let size = size(cache.size(kept.id));
        match kept.names.as_slice() {
            [] => text += &row("-", digest, &size, &used),
            names => names.iter().for_each(|name| text += &row(name, digest, &size, &used)),
        }
    }
    text
}

fn object(cache: &Cache, kept: &Kept, used: SystemTime) -> serde_json::Value {
    let seconds = used.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    json!({
        "digest": kept.id.to_string(),
        "names": kept.names,
        "bytes": cache.size(kept.id),
        "used": seconds,
        "running": cache.is_running(kept.id),
    })
}

fn load(cache: &Cache, matches: &ArgMatches) -> Result<String> {
    let mut text = String::new();
    let mut rows = Vec::new();
    for reference in matches.get_many::<String>("image").into_iter().flatten() {
        let kept = image::find(reference, cache)?.unpack()?;
        text += &format!("{}  {}\n", kept.id, kept.names.join(", "));
        rows.push(object(cache, &kept, SystemTime::now()));
    }
    Ok(if matches.get_flag("json") { format!("{}\n", json!(rows)) } else { text })
}

fn remove(cache: &Cache, matches: &ArgMatches) -> Result<String> {
    let names: Vec<&String> = matches.get_many("image").into_iter().flatten().collect();
    let limit = match (matches.get_flag("all"), matches.get_one::<Period>("unused")) {
        (true, _) => Some(Duration::ZERO),
        (false, limit) => limit.map(|limit| limit.duration()),
    };
    let mut gone = Vec::new();
    match limit {
        Some(limit) => {
            for (kept, used) in cache.all() {
                let old = limit.is_zero() || used.elapsed().unwrap_or_default() >= limit;
                if old && !cache.is_used(kept.id) {
                    gone.push(kept);
                }
            }
        }
        None if names.is_empty() => {
            return Err(Fail::new(Why::Usage, "remove images: none is named")
                .hint("name some, or pass --all or --unused 720h; `mayfly image list` tells them"));
        }
        None => {
            for name in names {
                let found = image::in_cache(name, cache)?.ok_or_else(|| {
                    Fail::new(Why::Missing, format!("remove image {name}"))
                        .because("there is no such image in the cache")
                        .hint("`mayfly image list` tells what there is")
                })?;
                if cache.is_used(found.id) {
                    return Err(Fail::new(Why::Denied, format!("remove image {name}"))
                        .because("a machine runs on it")
                        .hint("end that first"));
                }
                if !gone.contains(&found) {
                    gone.push(found);
                }
            }
        }
    }
    let mut text = String::new();
    for kept in gone {
        cache.remove(kept.id)?;
        text += &format!("{}  {}\n", kept.id, kept.names.join(", "));
    }
    Ok(text)
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    let tenths = |unit: u64| format!("{}.{}", bytes / unit, bytes % unit * 10 / unit);
    match bytes {
        _ if bytes >= 1 << 30 => format!("{} GiB", tenths(1 << 30)),
        _ if bytes >= 1 << 20 => format!("{} MiB", tenths(1 << 20)),
        _ => format!("{} KiB", bytes.div_ceil(1 << 10)),
    }
}

/// A time for people.
fn ago(then: SystemTime) -> String {
    let seconds = then.elapsed().unwrap_or_default().as_secs();
    match seconds {
        _ if seconds >= 2 * 86_400 => format!("{} days ago", seconds / 86_400),
        _ if seconds >= 2 * 3600 => format!("{} hours ago", seconds / 3600),
        _ if seconds >= 120 => format!("{} minutes ago", seconds / 60),
        _ => "just now".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_for_people() {
        let sizes = [(0, "0 KiB"), (1, "1 KiB"), (1 << 20, "1.0 MiB"), (5 << 29, "2.5 GiB")];
        sizes.iter().for_each(|(bytes, text)| assert_eq!(size(*bytes), *text));
        for (seconds, text) in
            [(5, "just now"), (600, "10 minutes ago"), (7200, "2 hours ago"), (864_000, "10 days ago")]
        {
            assert_eq!(ago(SystemTime::now() - Duration::from_secs(seconds)), text);
        }
    }
}
