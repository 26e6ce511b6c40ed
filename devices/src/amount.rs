//! Amounts as people write them in flags: `500`, `64K`, `100M` (powers of 1024).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of operations or bytes, written with or without a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Amount(pub u64);

const UNITS: [(&str, u32); 4] = [("T", 40), ("G", 30), ("M", 20), ("K", 10)];

impl FromStr for Amount {
    type Err = String;

    fn from_str(text: &str) -> Result<Amount, String> {
        let wrong = || format!("{text:?} is no amount: write 500, 64K, 100M or 2G");
        let upper = text.to_ascii_uppercase();
        let bare = upper.strip_suffix("IB").unwrap_or(&upper);
        let unit = UNITS.iter().find_map(|(unit, shift)| Some((bare.strip_suffix(unit)?, *shift)));
        let (number, shift) = unit.unwrap_or((&upper, 0));
        let plain = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
        let number: u64 = number.parse().ok().filter(|_| plain).ok_or_else(wrong)?;
        number.checked_mul(1 << shift).map(Amount).ok_or_else(wrong)
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |shift: &u32| self.0 != 0 && self.0.is_multiple_of(1 << shift);
        let (unit, shift) = UNITS.into_iter().find(|(_, shift)| fits(shift)).unwrap_or(("", 0));
        write!(f, "{}{unit}", self.0 >> shift)
    }
}

impl TryFrom<String> for Amount {
    type Error = String;
    fn try_from(text: String) -> Result<Amount, String> {
        text.parse()
    }
}

impl From<Amount> for String {
    fn from(amount: Amount) -> String {
        amount.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_and_written() {
        for (text, amount, again) in [
            ("0", 0, "0"),
            ("500", 500, "500"),
            ("64k", 65536, "64K"),
            ("1MiB", 1 << 20, "1M"),
            ("3072M", 3 << 30, "3G"),
        ] {
            assert_eq!(text.parse(), Ok(Amount(amount)), "{text}");
            assert_eq!(Amount(amount).to_string(), again);
        }
        for text in ["", "K", "-1", "+5", "1.5M", "5 M", "5B", "iB", "5iB", "99999999999T"] {
            let refused = text.parse::<Amount>().unwrap_err();
            assert_eq!(refused, format!("{text:?} is no amount: write 500, 64K, 100M or 2G"));
        }
    }
}
