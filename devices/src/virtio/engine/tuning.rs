//! What an operator changes while the driver runs.

use base::{Fail, Why};

use super::{Doorbell, Engine};

impl Engine {
    /// Has the device look again at what it stands on, and tells a driver that runs it what has changed.
    ///
    /// # Errors
    /// As [`Device::refresh`].
    pub fn refresh(&mut self) -> base::Result<()> {
        self.device.refresh()?;
        if self.shared.publish(self.device.config()) && self.running {
            self.shared.changed();
        }
        Ok(())
    }

    /// Changes settings of the device while it runs: `change` is `key=value,key=value`, with keys of its own.
    ///
    /// # Errors
    /// As [`Device::tune`]; [`Why::Unsupported`]: it has no such settings.
    pub fn tune(&mut self, change: &str) -> base::Result<()> {
        let name = &self.shared.name;
        self.device.tune(change).unwrap_or_else(|| {
            Err(Fail::new(Why::Unsupported, format!("change {name}"))
                .because("it has no settings that can change while it runs"))
        })?;
        if self.shared.publish(self.device.config()) && self.running {
            self.shared.changed();
        }
        if self.running {
            // What a limit held up may go on now.
            self.doorbells.iter().for_each(Doorbell::ring);
        }
        Ok(())
    }
}
