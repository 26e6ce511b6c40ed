//! Where the modules of a kernel are: beside its image, on this machine, or in the tree it was built in.

use std::path::{Path, PathBuf};

use base::{Fail, Result, Why};
use boot::inspect::{self, State};
use boot::kernel::Kernel;
use devices::catalog::Driver;

use super::{Module, Tree};

/// The modules of one kernel, or the places where none were.
pub struct Supply<'a> {
    kernel: &'a Kernel,
    tree: Option<Tree>,
    looked: Vec<PathBuf>,
}

impl<'a> Supply<'a> {
    /// Finds the modules of `kernel`. That there are none is no failure: it may have all it needs built in.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn find(kernel: &'a Kernel) -> Result<Supply<'a>> {
        let looked = places(kernel.path(), inspect::release(kernel)?.as_deref());
        let found =
            looked.iter().find(|dir| dir.join("modules.order").is_file() || dir.join("kernel").is_dir());
        let tree = found.map(|dir| Tree::open(dir)).transpose()?;
        Ok(Supply { kernel, tree, looked })
    }

    /// Adds a module that the run cannot do without, with what it depends on, unless it is built in.
    ///
    /// # Errors
    /// The kernel is known not to have it: says where it should be.
    pub fn need(&self, driver: Driver, order: &mut Vec<Module>) -> Result<()> {
        let Some(tree) = &self.tree else { return self.trust(driver) };
        tree.add(driver.module, order).map_err(|fail| {
            Fail::new(Why::Missing, format!("prepare kernel {}", self.kernel.name()))
                .because(fail.summary())
                .hint(format!("configure it with CONFIG_{}=m or y", driver.option))
        })
    }

    /// Adds a module that is of use, if there is one.
    pub fn wish(&self, driver: Driver, order: &mut Vec<Module>) {
        if let Some(Err(fail)) = self.tree.as_ref().map(|tree| tree.add(driver.module, order)) {
            ::log::info!("kernel {}: {fail}", self.kernel.name());
        }
    }

    /// Without any modules, the configuration says whether the kernel does without; where there is none, it is taken to.
    fn trust(&self, driver: Driver) -> Result<()> {
        let Driver { module: name, option } = driver;
        let cause = match inspect::option(self.kernel, option) {
            None | Some(State::Builtin) => return Ok(()),
            Some(State::Missing) => format!("it is configured without CONFIG_{option}"),
            Some(State::Module) => {
                let places: Vec<_> = self.looked.iter().map(|dir| dir.display().to_string()).collect();
                format!("{name} is a module and not found in {}", places.join(" or "))
            }
        };
        Err(Fail::new(Why::Missing, format!("prepare kernel {}", self.kernel.name()))
            .because(cause)
            .hint(format!("put its modules there, or build it with CONFIG_{option}=y")))
    }
}

/// Where modules can be, the nearest first.
fn places(image: Option<&Path>, release: Option<&str>) -> Vec<PathBuf> {
    let mut places = Vec::new();
    let image = image.and_then(|image| std::path::absolute(image).ok());
    if let Some(image) = &image {
        // `/lib/modules/RELEASE/vmlinuz`, and a build tree with `vmlinux` or `arch/x86/boot/bzImage`.
        let above = image.ancestors().skip(1).take(1);
        let build = image.ends_with("arch/x86/boot/bzImage").then(|| image.ancestors().nth(4)).flatten();
        places.extend(above.chain(build).map(Path::to_owned));
    }
    if let Some(release) = release {
        // `X/boot/vmlinuz-RELEASE` has them in `X/lib/modules/RELEASE`.
        let above = image.iter().flat_map(|image| image.ancestors().skip(1).take(2));
        places.extend(above.map(|dir| dir.join("lib/modules").join(release)));
        places.push(Path::new("/lib/modules").join(release));
    }
    places.dedup();
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// The smallest ELF file, which is taken for a kernel.
    fn image(path: &Path) {
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
        for word in [0x10_0000u64, 64, 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend(b"\0\0\0\0\x40\0\x38\0\x01\0\0\0\0\0\0\0\x01\0\0\0\x05\0\0\0");
        for word in [120u64, 0x10_0000, 0x10_0000, 1, 1, 8] {
            file.extend(word.to_le_bytes());
        }
        file.push(0xf4);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, file).unwrap();
    }

    #[test]
    fn modules_are_looked_for_near_the_image_first() {
        let text = |image: &str, release| {
            places(Some(Path::new(image)), release)
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            text("/x/boot/vmlinuz-6.1", Some("6.1")),
            ["/x/boot", "/x/boot/lib/modules/6.1", "/x/lib/modules/6.1", "/lib/modules/6.1"]
        );
        assert_eq!(text("/src/arch/x86/boot/bzImage", None), ["/src/arch/x86/boot", "/src"]);
    }

    #[test]
    fn what_a_kernel_lacks_is_told_with_the_place_and_the_option() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmlinux");
        image(&path);
        let kernel = Kernel::open(&path).unwrap();
        let need = |module: &'static str, option: &'static str| {
            let mut order = Vec::new();
            let driver = Driver { module, option };
            Supply::find(&kernel).unwrap().need(driver, &mut order).map(|()| order)
        };
        assert_eq!(need("virtio_blk", "VIRTIO_BLK").unwrap(), [], "nothing is known");
        fs::write(dir.path().join(".config"), "CONFIG_VIRTIO_BLK=m\nCONFIG_VIRTIO_NET=y\n").unwrap();
        assert_eq!(need("virtio_net", "VIRTIO_NET").unwrap(), []);
        let text = need("virtio_blk", "VIRTIO_BLK").unwrap_err().to_string();
        assert!(text.contains(": virtio_blk is a module and not found in /"), "{text}");
        assert!(
            text.ends_with("hint: put its modules there, or build it with CONFIG_VIRTIO_BLK=y"),
            "{text}"
        );
        let text = need("xfs", "XFS_FS").unwrap_err().to_string();
        assert!(text.contains(": it is configured without CONFIG_XFS_FS\n"), "{text}");

        fs::write(dir.path().join("modules.order"), "drivers/block/virtio_blk.o\n").unwrap();
        fs::create_dir_all(dir.path().join("drivers/block")).unwrap();
        fs::write(dir.path().join("drivers/block/virtio_blk.ko"), "ELF\0license=GPL\0depends=\0").unwrap();
        let found = need("virtio_blk", "VIRTIO_BLK").unwrap();
        assert_eq!(found.iter().map(|module| module.name.as_str()).collect::<Vec<_>>(), ["virtio_blk"]);
        let text = need("overlay", "OVERLAY_FS").unwrap_err().to_string();
        assert!(text.contains("load kernel module overlay: it is neither built in nor in /"), "{text}");
        assert!(text.ends_with("hint: configure it with CONFIG_OVERLAY_FS=m or y"), "{text}");
    }
}
