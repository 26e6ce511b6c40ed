//! `mayfly kernel`: pulls kernels through the package manager, lists those that `--kernel` knows by name, removes them.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use base::{Fail, Result, Why};
use boot::kernel::Kernel;
use clap::{Arg, ArgMatches, Command as Clap};
use serde::Serialize;

use super::{complain, say};
use crate::kernels::{self, Cache, numbers};
use crate::outcome::{code, code_before_start};
use crate::plan::{Command, Plan, Root};
use crate::{log, machine};

/// The command.
pub fn command() -> Clap {
    Clap::new("kernel").about("Fetch, list and remove kernels").defer(commands)
}

/// Adds the commands below it.
fn commands(kernel: Clap) -> Clap {
    let name = Arg::new("name").value_name("NAME");
    let pull = Clap::new("pull")
        .about("Fetch a kernel with its modules through apt, without root, and print its name");
    let list = Clap::new("list").about("List the kernels that --kernel knows by name, and what each lacks");
    let remove = Clap::new("rm").about("Remove kernels that were fetched or unpacked");
    kernel
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .subcommand(pull.arg(name.clone().help(
            "What follows `linux-image-` in the name of its package: cloud-amd64, amd64, rt-amd64, a version [default: Debian's or Ubuntu's for virtual machines]",
        )))
        .subcommand(list.arg(super::command::json_switch("Print one JSON object")))
        .subcommand(remove.arg(name.required(true).num_args(1..).help("Its name, or a version")))
}

/// Carries out `mayfly kernel`; its exit code.
pub fn kernel(matches: &ArgMatches) -> u8 {
    let done = match matches.subcommand() {
        Some(("pull", matches)) => pull(matches.get_one::<String>("name").map(String::as_str)),
        Some(("list", matches)) => list(matches.get_flag("json")),
        Some(("rm", matches)) => remove(matches.get_many::<String>("name").into_iter().flatten()),
        _ => return code::USAGE,
    };
    match done {
        Ok(text) => say(&text),
        Err(fail) => {
            complain(&fail);
            code_before_start(&fail)
        }
    }
}

fn pull(name: Option<&str>) -> Result<String> {
    // In a pipe there is only the name.
    let shown = std::io::stderr().is_terminal();
    let tell = |what: &str| {
        if shown {
            log::note(&format!("fetching {what}"));
        }
    };
    let pulled = kernels::pull(&Cache::find()?, name, tell)?;
    if shown {
        let how = if pulled.known { "was there already" } else { "is ready" };
        log::note(&format!("{} {how}, in {}", pulled.kept.release, pulled.kept.dir.display()));
    }
    Ok(pulled.kept.release + "\n")
}

fn remove<'a>(names: impl Iterator<Item = &'a String>) -> Result<String> {
    let cache = Cache::find()?;
    let mut text = String::new();
    for name in names {
        for kept in cache.remove(name)? {
            text += &format!("{}\n", kept.name);
        }
    }
    Ok(text)
}

/// A kernel that has a name here.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Listed {
    name: String,
    origin: &'static str,
    image: PathBuf,
    package: Option<String>,
    bytes: u64,
    /// What keeps a command from running on it over a root that is a directory; nothing, if it is null.
    lacks: Option<String>,
}

fn list(json: bool) -> Result<String> {
    let listed = known(&Cache::find()?, Path::new("/"));
    if json {
        let text = serde_json::to_string(&serde_json::json!({ "kernels": listed }));
        return Ok(text.map_err(|cause| Fail::new(Why::Host, "write the list down").because(cause))? + "\n");
    }
    Ok(render(&listed))
}

/// Those that were pulled, those of packages that were unpacked, those that are installed below `top`.
fn known(cache: &Cache, top: &Path) -> Vec<Listed> {
    let kept = cache.kernels();
    let several = |release: &str| kept.iter().filter(|other| other.release == release).count() > 1;
    let ours = kept.iter().map(|kernel| Listed {
        name: if several(&kernel.release) { kernel.name.clone() } else { kernel.release.clone() },
        origin: if kernel.pulled { "pulled" } else { "package" },
        image: kernel.image(),
        package: Some(kernel.package.clone()),
        bytes: size(&kernel.dir),
        lacks: lack(&kernel.image()),
    });
    let mut listed: Vec<_> = ours.collect();
    let mut installed = super::kernel::installed(top);
    installed.sort_by_cached_key(|(release, _)| std::cmp::Reverse(numbers(release)));
    listed.extend(installed.into_iter().map(|(name, image)| Listed {
        bytes: image.metadata().map_or(0, |about| about.len()),
        lacks: lack(&image),
        origin: "installed",
        package: None,
        name,
        image,
    }));
    listed
}

/// What a kernel lacks, as a run would say it.
fn lack(image: &Path) -> Option<String> {
    let command =
        Command { argv: vec!["true".into()], root: Root::Directory("/".into()), ..Command::default() };
    let plan = Plan { kernel: image.to_owned(), command: Some(command), ..Plan::default() };
    let checked = plan.complete().and_then(|plan| machine::check(&plan, &Kernel::open(image)?));
    checked.err().map(|fail| fail.summary())
}

/// Bytes of the files below a directory.
fn size(dir: &Path) -> u64 {
    let mut open = vec![dir.to_owned()];
    let mut sum: u64 = 0;
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(about) if about.is_dir() => open.push(entry.path()),
                Ok(about) => sum = sum.saturating_add(about.len()),
                Err(_) => {}
            }
        }
    }
    sum
}

fn render(listed: &[Listed]) -> String {
    if listed.is_empty() {
        return "no kernel has a name here; mayfly kernel pull fetches one\n".to_owned();
    }
    let width = listed.iter().map(|kernel| kernel.name.len()).max().unwrap_or_default().max(4);
    let mut text = format!("{:<width$}  ORIGIN     SIZE     LACKS\n", "NAME");
    for kernel in listed {
        let size = format!("{} MB", kernel.bytes.div_ceil(1_000_000));
        let lacks = kernel.lacks.as_deref().unwrap_or("-");
        text += &format!("{:<width$}  {:<9}  {size:<7}  {lacks}\n", kernel.name, kernel.origin);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_names_each_kernel_and_what_it_lacks() {
        assert!(render(&[]).contains("mayfly kernel pull"));
        let listed = |name: &str, lacks: Option<&str>| Listed {
            name: name.into(),
            origin: "pulled",
            image: "i".into(),
            package: None,
            bytes: 1_200_000,
            lacks: lacks.map(str::to_owned),
        };
        let text = render(&[listed("6.1.0-1", None), listed("6", Some("overlay is a module"))]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "NAME     ORIGIN     SIZE     LACKS");
        assert_eq!(lines[1], "6.1.0-1  pulled     2 MB     -");
        assert_eq!(lines[2], "6        pulled     2 MB     overlay is a module");
    }

    #[test]
    fn installed_kernels_are_listed_with_what_keeps_them_from_being_used() {
        let dir = tempfile::tempdir().unwrap();
        for release in ["6.9.1", "6.10.1"] {
            let boot = dir.path().join("boot");
            std::fs::create_dir_all(&boot).unwrap();
            std::fs::write(boot.join(format!("vmlinuz-{release}")), "text").unwrap();
        }
        let listed = known(&Cache::at(dir.path().join("none")), dir.path());
        let names: Vec<_> = listed.iter().map(|kernel| kernel.name.as_str()).collect();
        assert_eq!(names, ["6.10.1", "6.9.1"]);
        let lacks = listed[0].lacks.as_deref().unwrap();
        assert!(lacks.ends_with("it is a text file, not a kernel image"), "{lacks}");
    }
}
