//! Files made for somebody else: as their owner, and with the permissions that were asked for.

use std::cell::Cell;

use rustix::io::Errno;
use rustix::process::umask;
use rustix::thread::{
    CapabilitiesSecureBits, UnshareFlags, capabilities_secure_bits, set_capabilities_secure_bits,
    unshare_unsafe,
};

thread_local! {
    /// What this thread has of what [`prepare`] gives; whether it has a mask of its own.
    static READY: Cell<Option<bool>> = const { Cell::new(None) };
}

/// Gives this thread a mask of its own, of no bits, and lets it keep its rights when it makes files for others.
fn prepare() {
    if READY.get().is_some() {
        return;
    }
    // SAFETY: with this flag no descriptor is closed or copied; working directory, root and mask become this thread's own,
    // and nothing here relies on them being those of other threads.
    let unmasked = unsafe { unshare_unsafe(UnshareFlags::FS) }.is_ok();
    if unmasked {
        umask(rustix::fs::Mode::empty());
    }
    // Who asked was checked by who asks us, who knows all groups of the user, as the host does not. Where this is
    // refused the host checks too, by user and group alone.
    if rustix::process::geteuid().is_root()
        && let Ok(bits) = capabilities_secure_bits()
    {
        let _ = set_capabilities_secure_bits(bits | CapabilitiesSecureBits::NO_SETUID_FIXUP);
    }
    READY.set(Some(unmasked));
}

/// Whether the mask of the process takes permissions from what this thread makes: containers often refuse a thread a mask of
/// its own. Then they have to be set afterwards.
pub fn is_masked() -> bool {
    READY.get() != Some(true)
}

/// Has this thread make files for the user and group from here on; who it made them for before.
fn switch(user: u32, group: u32) -> (u32, u32) {
    // SAFETY: these calls change the user and group by which this one thread reaches files, and touch no memory.
    let (user, group) = unsafe { (libc::setfsuid(user), libc::setfsgid(group)) };
    (user.cast_unsigned(), group.cast_unsigned())
}

/// Runs `make`, with no mask of the process in the way of permissions if the host allows that ([`is_masked`]). With an `owner` (user, group), and if this process is
/// root, what it makes belongs to them; otherwise to who runs this process.
///
/// # Errors
/// `EPERM`: this process cannot act for them (a user namespace that does not have them).
pub fn as_owner<T>(owner: Option<(u32, u32)>, make: impl FnOnce() -> T) -> Result<T, Errno> {
    prepare();
    let me = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    let Some((user, group)) = owner.filter(|owner| me.0 == 0 && *owner != me) else { return Ok(make()) };
    if user == u32::MAX || group == u32::MAX {
        return Err(Errno::INVAL);
    }
    switch(user, group);
    // No number of a user: changes nothing, and says who it is now.
    let made = (switch(u32::MAX, u32::MAX) == (user, group)).then(make);
    switch(me.0, me.1);
    made.ok_or(Errno::PERM)
}
