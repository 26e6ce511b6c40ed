//! Fixed port numbers on which the chips and the firmware tables have to agree.

/// Sleep control register of a hardware-reduced machine, 1 byte (ACPI 6.5, section 4.8.3.7).
pub const SLEEP_CONTROL: u16 = 0x600;
/// Sleep status register, 1 byte (ACPI 6.5, section 4.8.3.7).
pub const SLEEP_STATUS: u16 = 0x601;
/// Reset register, 1 byte (ACPI 6.5, section 4.8.3.6).
pub const RESET: u16 = 0x602;
/// What resets the machine when written to [`RESET`].
pub const RESET_VALUE: u8 = 1;
/// The sleep type of soft-off, as the `\_S5` package and the sleep control register have it.
pub const SLEEP_TYPE_OFF: u8 = 5;
