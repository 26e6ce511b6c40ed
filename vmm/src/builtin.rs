//! What mayfly brings along for guests: the agent, and an initial RAM disk with it.

use agent::orders::Orders;
use base::Result;
use boot::cpio::Archive;
use boot::kernel::Kernel;

use crate::modules::{Module, Supply};
use crate::plan::{Plan, Transport};

/// The guest agent: a static program, made to be process 1.
pub static AGENT: &[u8] = include_bytes!(env!("MAYFLY_AGENT"));

/// mayfly's own initial RAM disk for a plan: the agent, the modules of `kernel` that devices need on this transport, and
/// the orders that make it a guest for commands.
///
/// # Errors
/// The kernel lacks what the command cannot do without, or its modules cannot be read.
pub fn initrd(plan: &Plan, kernel: &Kernel, transport: Transport) -> Result<Vec<u8>> {
    let (vital, wished) = plan.modules(transport.driver());
    let supply = Supply::find(kernel)?;
    let mut modules = Vec::new();
    vital.into_iter().try_for_each(|name| supply.need(name, &mut modules))?;
    wished.into_iter().for_each(|name| supply.wish(name, &mut modules));
    let named = |module: Module| (format!("{}.ko", module.name), module.content);
    let interfaces = plan.interfaces()?;
    let orders = plan.command.as_ref().map(|command| Orders { interfaces, ..command.orders() }.encode());
    pack(&modules.into_iter().map(named).collect::<Vec<_>>(), orders.as_deref())
}

/// The initial RAM disk with kernel modules, file name and content, which the agent loads in this order.
///
/// # Errors
/// A name is not one.
pub fn initrd_with(modules: &[(String, Vec<u8>)]) -> Result<Vec<u8>> {
    pack(modules, None)
}

fn pack(modules: &[(String, Vec<u8>)], orders: Option<&[u8]>) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    archive.file("init", 0o755, AGENT)?;
    if let Some(orders) = orders {
        archive.file(agent::orders::PATH, 0o600, orders)?;
    }
    if !modules.is_empty() {
        archive.directory("modules", 0o755)?;
        let order: String = modules.iter().map(|(name, _)| format!("{name}\n")).collect();
        archive.file("modules/order", 0o644, order.as_bytes())?;
    }
    for (name, content) in modules {
        archive.file(&format!("modules/{name}"), 0o644, content)?;
    }
    Ok(archive.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_is_a_small_static_program() {
        assert!(AGENT.starts_with(b"\x7fELF"));
        // A dynamic program names its interpreter.
        assert!(!AGENT.windows(10).any(|bytes| bytes == b"/ld-linux-"), "it is linked dynamically");
        assert!(AGENT.len() < 3 << 19, "{} bytes", AGENT.len());
    }

    #[test]
    fn modules_are_listed_in_their_order() {
        let archive = initrd_with(&[("b.ko".into(), b"B".to_vec()), ("a.ko".into(), b"A".to_vec())]).unwrap();
        assert!(archive.windows(10).any(|bytes| bytes == b"b.ko\na.ko\n"));
        assert!(initrd_with(&[]).unwrap().len() < archive.len());
    }
}
