//! `git bisect run mayfly bisect` over a repository whose commits hold guests of a few instructions.

use super::kernel;
use crate::harness::{Case, Room, Stop};

pub fn cases() -> Vec<Case> {
    vec![Case::new("bare::bisect::git_finds_the_commit", find), Case::new("bare::bisect::git_stops", stop)]
}

/// A repository with a commit for each of these guests, the oldest first; one that is none does not build.
fn repository(room: &mut Room<'_>, guests: &[&str]) -> Result<(), Stop> {
    let mut script = String::from(
        "git init -q repo && cd repo && git config user.email a@example.org && git config user.name A && printf 'kernel\\ncache\\n' > .gitignore",
    );
    for (number, guest) in guests.iter().enumerate() {
        let copy = match *guest {
            "broken" => "rm -f source".to_owned(),
            "text" => "echo no kernel > source".to_owned(),
            guest => format!("cp {} source", kernel(room, guest)?),
        };
        script += &format!(" && {copy} && git add -A && git commit -q --allow-empty -m commit-{number}");
    }
    room.shell(&script)?.code(0).map(drop)
}

/// Searches with this line for the build and these flags.
fn search(room: &mut Room<'_>, build: &str, flags: &str) -> Result<crate::ground::Output, Stop> {
    let (mayfly, options) = (room.mayfly.display(), room.ground.options());
    let script = format!(
        "cd repo && export XDG_CACHE_HOME=$PWD/cache && git bisect start HEAD $(git rev-list HEAD | tail -n 1) && \
         git bisect run {mayfly} bisect --build '{build}' {options} --kernel kernel --serial none {flags}; code=$?; \
         ls cache/mayfly/kernels; git status --short; exit $code"
    );
    room.shell(&script)
}

fn find(room: &mut Room<'_>) -> Result<(), Stop> {
    repository(room, &["hello", "hello", "tiny", "text", "hello", "triple", "leave", "broken", "triple"])?;
    let output = search(room, "cp source kernel", "")?;
    output.code(0)?.mentions("commit-5")?.mentions(" is the first bad commit\n")?;
    output.complains("note: bad: ")?.complains("note: good\n")?;
    if output.text().contains("fetch-") {
        return Err(output.differs("nothing that is left in the cache"));
    }
    // Those that cannot be tested, beside the ones that matter.
    repository_in(room, "again", &["hello", "text", "broken", "triple"])?;
    let output = room.shell(&format!(
        "cd again && export XDG_CACHE_HOME=$PWD/cache && git checkout -q HEAD~1 && \
         {0} bisect --build 'cp source kernel' {1} --kernel kernel; echo code=$?; git checkout -q HEAD~1; \
         {0} bisect --build 'cp source kernel' {1} --kernel kernel; echo code=$?; {0} bisect {1}; echo code=$?",
        room.mayfly.display(),
        room.ground.options()
    ))?;
    output.says("code=125\ncode=125\ncode=125\n")?;
    output.complains("note: skipped: the build ended with 1\n")?;
    output.complains("note: skipped: load kernel kernel: it is a text file")?;
    output.complains("note: skipped: no kernel was built here")?;
    Ok(())
}

fn repository_in(room: &mut Room<'_>, name: &str, guests: &[&str]) -> Result<(), Stop> {
    room.shell("mv repo first")?;
    repository(room, guests)?;
    room.shell(&format!("mv repo {name}")).map(drop)
}

/// What says nothing of a commit makes none bad: git stops.
fn stop(room: &mut Room<'_>) -> Result<(), Stop> {
    repository(room, &["hello", "hello", "triple", "triple"])?;
    search(room, "no-such-compiler", "")?
        .code(128)?
        .complains("note: stopped: the build ended with 127\n")?;
    search(room, "cp source kernel", "--disk nothing.img")?
        .code(128)?
        .complains("note: stopped: this says nothing of the commit\n")?;
    search(room, "cp source kernel", "--cpus 99")?.code(128)?.complains("error: give the machine 99 CPUs")?;
    search(room, "cp source kernel", "--json")?.code(128)?.complains("error: bisect with --json")?;
    Ok(())
}
