//! Cards by name: what a device that is not here would leave to a program.

const GIB: f64 = (1u64 << 30) as f64;

/// What the CUDA context takes of an idle card before the first allocation, about: half a GiB.
pub const CONTEXT_BYTES: u64 = 1 << 29;

/// A card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Card {
    pub name: &'static str,
    /// All the memory that CUDA reports, less than what is printed on the box: error correction
    /// and the driver have had their part.
    pub total_bytes: u64,
    /// Compute capability, times ten.
    pub capability: u32,
}

/// podium's CUDA kernels need at least this compute capability, times ten.
pub const MIN_CAPABILITY: u32 = 80;

const fn card(name: &'static str, total_gib: f64, capability: u32) -> Card {
    Card {
        name,
        total_bytes: (total_gib * GIB) as u64,
        capability,
    }
}

/// Known cards. Totals are those that CUDA's out-of-memory messages state in public issue
/// threads (a100-40: 39.50 to 39.59; a100-80: 79.25; 4090-24: 23.64; t4-16: 14.76), elsewhere
/// what nvidia-smi prints less the same part; on a card that is here the driver is asked.
pub const CARDS: [Card; 7] = [
    card("t4-16", 14.75, 75),
    card("l4-24", 22.03, 89),
    card("4090-24", 23.64, 89),
    card("a100-40", 39.56, 80),
    card("a100-80", 79.25, 80),
    card("h100-80", 79.11, 90),
    card("h200-141", 139.80, 90),
];

impl Card {
    /// The card of a name.
    pub fn named(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        CARDS.into_iter().find(|card| card.name == name)
    }

    /// What is left to a program.
    pub fn usable_bytes(&self) -> u64 {
        self.total_bytes - CONTEXT_BYTES
    }

    /// Whether podium's kernels can run on it.
    pub fn is_supported(&self) -> bool {
        self.capability >= MIN_CAPABILITY
    }
}
