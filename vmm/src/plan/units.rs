//! Sizes and periods as people write them: `512M`, `30s`.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A number of bytes. Read from `512M`, `2G`, `64KiB` (powers of 1024) or a plain number of bytes; written in the
/// largest unit that divides it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Either", into = "String")]
pub struct Size(u64);

impl Size {
    /// A size of so many bytes.
    pub const fn of(bytes: u64) -> Self {
        Size(bytes)
    }

    /// A size of so many MiB.
    pub const fn mib(mib: u32) -> Self {
        Size((mib as u64) << 20)
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

const SIZES: [(&str, u32); 5] = [("T", 40), ("G", 30), ("M", 20), ("K", 10), ("", 0)];

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "a size is written as 512M, 2G or a number of bytes".to_owned();
        let (number, unit) = split(text);
        let unit = unit.to_ascii_uppercase();
        let shift = SIZES
            .iter()
            .find(|(name, _)| unit == *name || unit == format!("{name}IB"))
            .map(|(_, shift)| *shift)
            .ok_or_else(wrong)?;
        let number: u64 = number.parse().map_err(|_| wrong())?;
        number.checked_mul(1 << shift).map(Size).ok_or_else(|| "it is more than 64 bits can count".to_owned())
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, shift) = SIZES
            .into_iter()
            .find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift))
            .unwrap_or(("", 0));
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

/// A span of time. Read from `30s`, `2m`, `1m30s`, `500ms`, `1h` or a plain number of seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Either", into = "String")]
pub struct Period(Duration);

impl Period {
    /// A span of so long; what is shorter than a millisecond is not written down.
    pub const fn of(span: Duration) -> Self {
        Period(span)
    }

    /// The span as the standard library has it.
    pub const fn duration(self) -> Duration {
        self.0
    }
}

const PERIODS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

impl std::str::FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "a duration is written as 30s, 2m or 500ms".to_owned();
        if let Ok(seconds) = text.parse() {
            return Ok(Period(Duration::from_secs(seconds)));
        }
        let (mut rest, mut total) = (text, 0u64);
        while !rest.is_empty() {
            let (number, tail) = split(rest);
            let unit = &tail[..tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len())];
            let factor = PERIODS.iter().find(|(name, _)| *name == unit).ok_or_else(wrong)?.1;
            let number: u64 = number.parse().map_err(|_| wrong())?;
            let part = number.checked_mul(factor).ok_or_else(wrong)?;
            total = total.checked_add(part).ok_or_else(wrong)?;
            rest = &tail[unit.len()..];
        }
        if text.is_empty() { Err(wrong()) } else { Ok(Period(Duration::from_millis(total))) }
    }
}

impl fmt::Display for Period {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let millis = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        let (unit, factor) = PERIODS
            .into_iter()
            .find(|(_, factor)| millis != 0 && millis.is_multiple_of(*factor))
            .unwrap_or(("s", 1000));
        write!(f, "{}{unit}", millis / factor)
    }
}

/// Digits, and what follows them.
fn split(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// In JSON, a number or a string.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a string such as `512M` or `30s`, or a whole number")]
enum Either {
    Number(u64),
    Text(String),
}

impl TryFrom<Either> for Size {
    type Error = String;
    fn try_from(value: Either) -> Result<Self, String> {
        match value {
            Either::Number(bytes) => Ok(Size(bytes)),
            Either::Text(text) => text.parse(),
        }
    }
}

impl TryFrom<Either> for Period {
    type Error = String;
    fn try_from(value: Either) -> Result<Self, String> {
        match value {
            Either::Number(seconds) => Ok(Period(Duration::from_secs(seconds))),
            Either::Text(text) => text.parse(),
        }
    }
}

impl From<Size> for String {
    fn from(size: Size) -> String {
        size.to_string()
    }
}

impl From<Period> for String {
    fn from(period: Period) -> String {
        period.to_string()
    }
}

impl schemars::JsonSchema for Size {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Size".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "A number of bytes, or a string with a unit (powers of 1024): `512M`, `2G`, `64KiB`.",
            "anyOf": [
                { "type": "integer", "minimum": 0 },
                { "type": "string", "pattern": "^[0-9]+([KMGTkmgt]([iI][bB])?)?$" },
            ],
        })
    }
}

impl schemars::JsonSchema for Period {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Period".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "description": "A number of seconds, or a string with units: `30s`, `1m30s`, `500ms`, `1h`.",
            "anyOf": [
                { "type": "integer", "minimum": 0 },
                { "type": "string", "pattern": "^([0-9]+|([0-9]+(h|m|s|ms))+)$" },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written_back() {
        for (text, bytes, again) in [
            ("512M", 512 << 20, "512M"),
            ("2G", 2 << 30, "2G"),
            ("1048576", 1 << 20, "1M"),
            ("64kib", 64 << 10, "64K"),
            ("1MiB", 1 << 20, "1M"),
            ("10T", 10 << 40, "10T"),
            ("1536M", 1536 << 20, "1536M"),
            ("0", 0, "0"),
            ("7", 7, "7"),
        ] {
            let size: Size = text.parse().unwrap();
            assert_eq!((size.bytes(), size.to_string().as_str()), (bytes, again), "{text}");
        }
        for text in
            ["", "M", "12X", "1.5G", "-1", "1 G", "512MB", "99999999999999999999", "99999999T", "1G2M"]
        {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
    }

    #[test]
    fn periods_are_read_and_written_back() {
        for (text, millis, again) in [
            ("30s", 30_000, "30s"),
            ("2m", 120_000, "2m"),
            ("500ms", 500, "500ms"),
            ("1m30s", 90_000, "90s"),
            ("7", 7000, "7s"),
            ("1h", 3_600_000, "1h"),
            ("0s", 0, "0s"),
        ] {
            let period: Period = text.parse().unwrap();
            assert_eq!(
                (period.duration().as_millis(), period.to_string().as_str()),
                (millis, again),
                "{text}"
            );
        }
        for text in
            ["", "s", "30x", "1.5s", "-1s", "30 s", "99999999999999999999s", "9999999999999999h", "10ss"]
        {
            assert!(text.parse::<Period>().is_err(), "{text}");
        }
    }

    #[test]
    fn json_takes_numbers_and_strings() {
        assert_eq!(serde_json::from_str::<Size>("1048576").unwrap(), Size::mib(1));
        assert_eq!(serde_json::from_str::<Size>("\"1M\"").unwrap(), Size::mib(1));
        assert_eq!(serde_json::from_str::<Period>("2").unwrap().duration(), Duration::from_secs(2));
        assert_eq!(serde_json::to_string(&Size::mib(2048)).unwrap(), "\"2G\"");
        assert!(serde_json::from_str::<Size>("-1").is_err());
    }
}
