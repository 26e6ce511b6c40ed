//! What can change of a disk while the guest runs: its size, and its limits.

use base::throttle::Rate;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::amount::Amount;

/// Keys that are not there leave things as they are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// Makes the image file longer, and the disk with it; `auto`: the disk is as long as the image is now.
    pub size: Option<Size>,
    /// Requests in a second at the most; `off`: no limit.
    pub iops: Option<Limit>,
    /// Requests that may be saved up for a burst (default: those of one second).
    pub iops_burst: Option<Amount>,
    /// Bytes in a second at the most; `off`: no limit.
    pub bandwidth: Option<Limit>,
    /// Bytes that may be saved up for a burst (default: those of one second).
    pub bandwidth_burst: Option<Amount>,
}

/// A size of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
#[schemars(with = "String")]
pub enum Size {
    /// That of its image.
    Auto,
    /// So many bytes.
    Bytes(u64),
}

impl TryFrom<String> for Size {
    type Error = String;
    fn try_from(text: String) -> Result<Size, String> {
        if text == "auto" { Ok(Size::Auto) } else { Ok(Size::Bytes(text.parse::<Amount>()?.0)) }
    }
}

/// A limit, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(try_from = "String")]
#[schemars(with = "String")]
pub struct Limit(Option<u64>);

impl TryFrom<String> for Limit {
    type Error = String;
    fn try_from(text: String) -> Result<Limit, String> {
        if text == "off" {
            return Ok(Limit(None));
        }
        match text.parse::<Amount>()?.0 {
            0 => Err("it lets no request through: write off for no limit".to_owned()),
            limit => Ok(Limit(Some(limit))),
        }
    }
}

impl Change {
    /// What is wrong with it, if something is.
    pub fn fault(&self) -> Option<&'static str> {
        let burst_alone = |limit: Option<Limit>, burst: Option<Amount>| {
            burst.is_some() && limit.is_none_or(|limit| limit.0.is_none())
        };
        let empty = *self == Change::default();
        let alone =
            burst_alone(self.iops, self.iops_burst) || burst_alone(self.bandwidth, self.bandwidth_burst);
        let ragged =
            matches!(self.size, Some(Size::Bytes(bytes)) if bytes == 0 || !bytes.is_multiple_of(512));
        [
            (empty, "nothing is to change"),
            (alone, "a burst needs a limit: say it as well"),
            (ragged, "the size is no whole number of sectors of 512 bytes"),
        ]
        .into_iter()
        .find_map(|(wrong, why)| wrong.then_some(why))
    }

    /// The new limit of requests, if it changes.
    pub fn operations(&self) -> Option<Option<Rate>> {
        self.iops.map(|limit| rate(limit, self.iops_burst))
    }

    /// The new limit of bytes, if it changes.
    pub fn bytes(&self) -> Option<Option<Rate>> {
        self.bandwidth.map(|limit| rate(limit, self.bandwidth_burst))
    }
}

fn rate(limit: Limit, burst: Option<Amount>) -> Option<Rate> {
    let per_second = limit.0?;
    Some(Rate { per_second, burst: burst.map_or(per_second, |Amount(burst)| burst).max(1) })
}
