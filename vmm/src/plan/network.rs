//! The network of a command: what its guest is told of the cards of the machine.

use agent::orders;
use base::Result;
use devices::catalog;

use super::{Device, Plan};

impl Plan {
    /// The interfaces that the agent sets up before the command starts.
    ///
    /// # Errors
    /// The settings of a card make no sense.
    pub fn interfaces(&self) -> Result<Vec<orders::Interface>> {
        let mut all = Vec::new();
        for device in &self.devices {
            let entry = catalog::find(&device.kind);
            let found = entry.map(|entry| entry.interface(&device.spec, &device.name)).transpose()?.flatten();
            let Some(catalog::Interface { mac, addresses, gateways, servers }) = found else { continue };
            all.push(orders::Interface { mac, addresses, gateways, servers });
        }
        Ok(all)
    }
}

impl Device {
    /// Whether the agent sets it up, so that its driver has to be there.
    pub(super) fn is_ordered(&self) -> bool {
        let entry = catalog::find(&self.kind);
        entry.is_some_and(|entry| matches!(entry.interface(&self.spec, &self.name), Ok(Some(_))))
    }
}
