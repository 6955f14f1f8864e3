//! The forms that single flags take.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

/// A count that must be at least 1.
pub fn positive(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(0) | Err(_) => Err("expected a whole number of at least 1".to_owned()),
        Ok(n) => Ok(n),
    }
}

/// The most worker threads: each has its own part of the workspace.
pub const MAX_THREADS: usize = 4096;

/// A count of worker threads.
pub fn threads(text: &str) -> Result<usize, String> {
    up_to::<MAX_THREADS>(text)
}

/// A count from 1 to `MOST`.
pub fn up_to<const MOST: usize>(text: &str) -> Result<usize, String> {
    match positive(text) {
        Ok(n) if n <= MOST => Ok(n),
        _ => Err(format!("expected a whole number from 1 to {MOST}")),
    }
}

/// Temperatures that can be sampled at; 0 is greedy.
pub const TEMPERATURES: RangeInclusive<f32> = 0.0..=100.0;

/// A sampling temperature.
pub fn temperature(text: &str) -> Result<f32, String> {
    let value = text.parse::<f32>().ok();
    value
        .filter(|t| TEMPERATURES.contains(t))
        .ok_or_else(|| "expected a number from 0 to 100".to_owned())
}

/// The most slots or positions: the engine holds no more of either.
const MAX_AUTO_OR: usize = 1 << 24;

/// `auto`, or a count from 1 to 2^24.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum AutoOr {
    #[default]
    Auto,
    Exactly(usize),
}

impl AutoOr {
    /// The count, when one was given.
    pub fn exactly(self) -> Option<usize> {
        match self {
            AutoOr::Auto => None,
            AutoOr::Exactly(n) => Some(n),
        }
    }
}

impl FromStr for AutoOr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(AutoOr::Auto),
            _ => match positive(text) {
                Ok(n) if n <= MAX_AUTO_OR => Ok(AutoOr::Exactly(n)),
                _ => Err(format!(
                    "expected `auto` or a whole number from 1 to {MAX_AUTO_OR}"
                )),
            },
        }
    }
}

impl fmt::Display for AutoOr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AutoOr::Auto => f.write_str("auto"),
            AutoOr::Exactly(n) => write!(f, "{n}"),
        }
    }
}

/// The part of a data set that a run takes: shard `index` of `count`, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    pub index: usize,
    pub count: usize,
}

impl Shard {
    /// Whether the row with this input index belongs to the shard: rows are dealt in turn, so
    /// that a sorted file spreads evenly.
    pub fn takes(self, row: usize) -> bool {
        row % self.count == self.index - 1
    }
}

impl FromStr for Shard {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text
            .split_once('/')
            .and_then(|(i, n)| Some((i.parse::<usize>().ok()?, n.parse::<usize>().ok()?)));
        match parsed {
            Some((index, count)) if index >= 1 && index <= count => Ok(Shard { index, count }),
            _ => Err("expected I/N with 1 <= I <= N, such as 2/3".to_owned()),
        }
    }
}

impl fmt::Display for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.index, self.count)
    }
}

/// A number of bytes: `4GiB`, `800MB`, `1073741824`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let split = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let factor = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "k" | "kib" => 1024.0,
            "m" | "mib" => 1024.0 * 1024.0,
            "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
            _ => {
                return Err(
                    "expected bytes with an optional KiB, MiB, GiB, KB, MB or GB".to_owned(),
                );
            }
        };
        match number.parse::<f64>() {
            Ok(n) if n > 0.0 && n * factor < 9e18 => Ok(Bytes((n * factor) as u64)),
            _ => Err("expected a positive size such as 4GiB".to_owned()),
        }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// A span of time: `90s`, `20m`, `1.5h`; a bare number is seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seconds(pub f64);

impl FromStr for Seconds {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (number, factor) = match text.char_indices().last() {
            Some((at, 's')) => (&text[..at], 1.0),
            Some((at, 'm')) => (&text[..at], 60.0),
            Some((at, 'h')) => (&text[..at], 3600.0),
            _ => (text, 1.0),
        };
        match number.parse::<f64>() {
            Ok(n) if n >= 0.0 && n.is_finite() => Ok(Seconds(n * factor)),
            _ => Err("expected a time such as 90s, 20m or 1.5h".to_owned()),
        }
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}s", self.0)
    }
}

/// `--device`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Auto,
    Cpu,
    /// A GPU, and which one.
    Cuda(Option<u32>),
}

impl FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Device::Auto),
            "cpu" => Ok(Device::Cpu),
            "cuda" => Ok(Device::Cuda(None)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|n| n.parse().ok())
                .map(|n| Device::Cuda(Some(n)))
                .ok_or_else(|| "expected auto, cpu, cuda or cuda:N".to_owned()),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Auto => f.write_str("auto"),
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(None) => f.write_str("cuda"),
            Device::Cuda(Some(n)) => write!(f, "cuda:{n}"),
        }
    }
}

/// A calendar day, `YYYY-MM-DD`.
pub fn date(text: &str) -> Result<String, String> {
    let ok = text.len() == 10
        && text.char_indices().all(|(i, c)| match i {
            4 | 7 => c == '-',
            _ => c.is_ascii_digit(),
        })
        && matches!(
            text.get(5..7).and_then(|m| m.parse::<u32>().ok()),
            Some(1..=12)
        )
        && matches!(
            text.get(8..10).and_then(|d| d.parse::<u32>().ok()),
            Some(1..=31)
        );
    if ok {
        Ok(text.to_owned())
    } else {
        Err("expected a day such as 2026-01-31".to_owned())
    }
}

macro_rules! serde_as_text {
    ($($t:ty),*) => {$(
        impl serde::Serialize for $t {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                s.collect_str(self)
            }
        }
        impl<'de> serde::Deserialize<'de> for $t {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = text_or_number(d)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
serde_as_text!(AutoOr, Shard, Bytes, Seconds, Device);

/// A configuration file may write `batch = 32` as well as `batch = "32"`.
fn text_or_number<'de, D: serde::Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    #[derive(serde::Deserialize)]
    #[serde(untagged)]
    enum TextOrNumber {
        Text(String),
        Integer(u64),
        Float(f64),
    }
    Ok(
        match <TextOrNumber as serde::Deserialize>::deserialize(d)? {
            TextOrNumber::Text(text) => text,
            TextOrNumber::Integer(n) => n.to_string(),
            TextOrNumber::Float(n) => n.to_string(),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temperature_is_a_number_from_0_to_100() {
        for text in ["nan", "inf", "-1", "100.5", "warm", ""] {
            assert!(temperature(text).is_err(), "{text}");
        }
        assert_eq!(temperature("0.7"), Ok(0.7));
        assert_eq!(temperature("100"), Ok(100.0));
    }

    #[test]
    fn a_count_has_a_limit() {
        assert_eq!(up_to::<9>("1"), Ok(1));
        assert_eq!(up_to::<9>("9"), Ok(9));
        for bad in ["0", "10", "-1", "18446744073709551616", "many"] {
            assert!(up_to::<9>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_times_and_shards_are_read() {
        assert_eq!("4GiB".parse(), Ok(Bytes(4 << 30)));
        assert_eq!("1.5k".parse(), Ok(Bytes(1536)));
        assert_eq!("800MB".parse(), Ok(Bytes(800_000_000)));
        assert!("4 parsecs".parse::<Bytes>().is_err());
        assert!("0".parse::<Bytes>().is_err());
        assert_eq!("20m".parse(), Ok(Seconds(1200.0)));
        assert_eq!("7".parse(), Ok(Seconds(7.0)));
        assert!("soon".parse::<Seconds>().is_err());
        assert_eq!("2/3".parse(), Ok(Shard { index: 2, count: 3 }));
        for bad in ["0/3", "4/3", "3", "a/b"] {
            assert!(bad.parse::<Shard>().is_err(), "{bad}");
        }
        assert_eq!("cuda:1".parse(), Ok(Device::Cuda(Some(1))));
        assert!("tpu".parse::<Device>().is_err());
        assert_eq!("16777216".parse(), Ok(AutoOr::Exactly(1 << 24)));
        for bad in ["0", "-1", "16777217", "18446744073709551615"] {
            assert!(bad.parse::<AutoOr>().is_err(), "{bad}");
        }
        assert_eq!(threads("4096"), Ok(4096));
        for bad in ["0", "4097", "18446744073709551615"] {
            assert!(threads(bad).is_err(), "{bad}");
        }
        assert!(date("2026-13-01").is_err());
        assert_eq!(date("2026-01-31"), Ok("2026-01-31".to_owned()));
    }

    #[test]
    fn every_row_belongs_to_one_shard() {
        for row in 0..100 {
            let owners = (1..=3)
                .filter(|&index| Shard { index, count: 3 }.takes(row))
                .count();
            assert_eq!(owners, 1);
        }
    }
}
