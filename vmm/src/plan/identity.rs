//! Who the machine says it is: SMBIOS texts, and the generation ID.

use std::fmt;
use std::str::FromStr;

use base::Result;
use devices::flag::{self, Form};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The flag.
const FORM: Form = Form { flag: "smbios", bare: "product", example: "product=ci-runner,serial=42,oem=job=7" };
/// The name of this program in the guest.
const MAYFLY: &str = "mayfly";

/// What the guest reads about its machine in SMBIOS: /sys/class/dmi/id, dmidecode.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Smbios {
    /// Who made it (default: mayfly).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manufacturer: Option<String>,
    /// What it is (default: mayfly).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub product: Option<String>,
    /// Its version (default: that of mayfly).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Its serial number (default: none).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Its UUID (default: none).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    /// The family it belongs to (default: none).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// OEM strings (type 11); may be given several times. systemd takes credentials from them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub oem: Vec<String>,
}

impl Smbios {
    /// Reads the text of the flag.
    ///
    /// # Errors
    /// [`base::Why::Usage`]: an unknown key, a bad value.
    pub fn parse(text: &str) -> Result<Smbios> {
        flag::parse(&FORM, text)
    }

    /// The same with the defaults filled in, as `boot` takes it.
    pub fn identity(&self) -> boot::smbios::Identity<'_> {
        boot::smbios::Identity {
            manufacturer: self.manufacturer.as_deref().unwrap_or(MAYFLY),
            product: self.product.as_deref().unwrap_or(MAYFLY),
            version: self.version.as_deref().unwrap_or(env!("CARGO_PKG_VERSION")),
            serial: self.serial.as_deref().unwrap_or_default(),
            uuid: self.uuid.map(Uuid::bytes),
            family: self.family.as_deref().unwrap_or_default(),
            oem: &self.oem,
        }
    }
}

/// A UUID, written `01234567-89ab-cdef-0123-456789abcdef`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Uuid([u8; 16]);

impl Uuid {
    /// Its bytes in the order in which they are written.
    pub const fn bytes(self) -> [u8; 16] {
        self.0
    }
}

/// The digits of each part.
const PARTS: [usize; 5] = [8, 4, 4, 4, 12];

impl FromStr for Uuid {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "a UUID is written as 01234567-89ab-cdef-0123-456789abcdef".to_owned();
        let digits = |part: &str| part.bytes().all(|digit| digit.is_ascii_hexdigit());
        if !text.split('-').map(str::len).eq(PARTS) || !text.split('-').all(digits) {
            return Err(wrong());
        }
        let number = u128::from_str_radix(&text.replace('-', ""), 16).map_err(|_| wrong())?;
        Ok(Uuid(number.to_be_bytes()))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = format!("{:032x}", u128::from_be_bytes(self.0));
        let mut rest = digits.as_str();
        for (number, len) in PARTS.into_iter().enumerate() {
            let (part, tail) = rest.split_at(len);
            write!(f, "{}{part}", if number == 0 { "" } else { "-" })?;
            rest = tail;
        }
        Ok(())
    }
}

impl TryFrom<String> for Uuid {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Uuid> for String {
    fn from(uuid: Uuid) -> String {
        uuid.to_string()
    }
}

/// The VM generation ID: `random`, or a UUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub enum GenerationId {
    /// Another one for each machine.
    Random,
    /// This one.
    Given(Uuid),
}

impl FromStr for GenerationId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "random" {
            return Ok(GenerationId::Random);
        }
        text.parse().map(GenerationId::Given).map_err(|cause| format!("it is `random` or a UUID; {cause}"))
    }
}

impl TryFrom<String> for GenerationId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<GenerationId> for String {
    fn from(id: GenerationId) -> String {
        match id {
            GenerationId::Random => "random".to_owned(),
            GenerationId::Given(uuid) => uuid.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_and_written_back() {
        let text = "01234567-89ab-cdef-0123-456789abcdef";
        let uuid: Uuid = text.to_uppercase().parse().unwrap();
        assert_eq!(uuid.to_string(), text);
        assert_eq!(uuid.bytes()[..4], [0x01, 0x23, 0x45, 0x67]);
        for wrong in
            ["", "random", "0123456789abcdef0123456789abcdef", "+1234567-89ab-cdef-0123-456789abcdef"]
        {
            assert!(wrong.parse::<Uuid>().is_err(), "{wrong}");
        }
        assert_eq!("random".parse(), Ok(GenerationId::Random));
        assert_eq!(text.parse(), Ok(GenerationId::Given(uuid)));
    }

    #[test]
    fn what_is_not_said_is_mayfly() {
        let smbios = Smbios::parse("oem=a=b,serial=7,oem=c").unwrap();
        let identity = smbios.identity();
        assert_eq!((identity.manufacturer, identity.product, identity.serial), ("mayfly", "mayfly", "7"));
        assert_eq!(identity.oem, ["a=b", "c"]);
        assert_eq!(serde_json::to_string(&smbios).unwrap(), r#"{"serial":"7","oem":["a=b","c"]}"#);
    }
}
