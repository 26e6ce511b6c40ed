//! A container image as the root of a command, and what it says of the command.

use std::path::{Path, PathBuf};

use base::{Doing, Result, Why};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Command;
use super::command::PATH;
use crate::image::{Cache, Digest, Execution};

/// A container image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// `PATH` or `PATH#NAME`: an OCI image layout, what `docker save` writes, or the archive of a root file system; or the name of
    /// an image in the cache.
    pub image: String,
    /// Its digest, `sha256:...`: no other image will do. Any does if it is empty.
    #[serde(default)]
    pub digest: String,
}

impl Container {
    /// The digest that the plan wants, if it wants one.
    ///
    /// # Errors
    /// [`Why::Usage`]: it is none.
    pub fn wanted(&self) -> Result<Option<Digest>> {
        if self.digest.is_empty() {
            return Ok(None);
        }
        self.digest.parse().map(Some).doing(Why::Usage, || format!("use image {}", self.image))
    }

    /// The file with its root file system, once it is unpacked.
    ///
    /// # Errors
    /// Its digest is not known; there is no cache.
    pub(super) fn unpacked(&self) -> Result<PathBuf> {
        let digest = self.wanted()?.ok_or("its digest is not known");
        Ok(Cache::find()?.root(digest.doing(Why::Usage, || format!("use image {}", self.image))?))
    }
}

impl Command {
    /// Takes over what a container image says, where the command itself says nothing.
    pub fn adopt(&mut self, execution: &Execution) {
        let own: Vec<String> =
            std::mem::take(&mut self.env).into_iter().filter(|word| word != PATH).collect();
        let (usual, hostname) = (PATH.to_owned(), format!("HOSTNAME={}", self.hostname));
        for word in [&usual, &hostname].into_iter().chain(&execution.env).chain(&own) {
            self.set_variable(word);
        }
        if self.user.is_empty() {
            self.user.clone_from(&execution.user);
        }
        if self.workdir.as_os_str().is_empty() {
            self.workdir = Path::new("/").join(&execution.working_dir);
        }
    }

    /// Sets a variable of the environment, instead of the one of that name. What has no name or no value is passed over: no
    /// program would find it.
    fn set_variable(&mut self, word: &str) {
        let Some((name, _)) = word.split_once('=').filter(|(name, _)| !name.is_empty()) else { return };
        let same = |old: &&mut String| old.split_once('=').is_some_and(|(old, _)| old == name);
        match self.env.iter_mut().find(same) {
            Some(old) => word.clone_into(old),
            None => self.env.push(word.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_says_what_the_command_does_not() {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let image = Execution {
            user: "ann".into(),
            env: words(&["A=1", "PATH=/image", "B=2", "nothing", "=none"]),
            working_dir: "srv".into(),
            ..Execution::default()
        };
        let mut command = Command::default();
        command.adopt(&image);
        assert_eq!(command.env, ["PATH=/image", "HOSTNAME=mayfly", "A=1", "B=2"]);
        assert_eq!((command.user.as_str(), command.workdir.as_path()), ("ann", Path::new("/srv")));
        let again = command.clone();
        command.adopt(&image);
        assert_eq!(command, again, "a plan that was written down is not changed");
        let mut own = Command {
            env: words(&["B=own", "C=3"]),
            user: "0".into(),
            workdir: "/own".into(),
            ..Command::default()
        };
        own.adopt(&image);
        assert_eq!(own.env, ["PATH=/image", "HOSTNAME=mayfly", "A=1", "B=own", "C=3"]);
        assert_eq!((own.user.as_str(), own.workdir.as_path()), ("0", Path::new("/own")));
    }
}
