//! In which format weights are held, and how many bytes each class of them takes.

use super::Checkpoint;

/// What the user asks for: a policy of formats by tensor class.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
pub enum Precision {
    /// As the checkpoint stores it.
    #[default]
    #[serde(rename = "stored")]
    Stored,
    /// MXFP4 experts, all else bf16: as released.
    #[serde(rename = "4bit")]
    Bits4,
    /// MXINT8 experts, attention projections and lm head.
    #[serde(rename = "8bit")]
    Bits8,
    /// bf16 throughout.
    #[serde(rename = "16bit")]
    Bits16,
    /// MXINT8 experts, all else bf16.
    #[serde(rename = "experts8")]
    Experts8,
    /// MXFP4 experts, MXINT8 attention projections and lm head.
    #[serde(rename = "4bit-dense8")]
    Bits4Dense8,
    /// MXFP4 experts, attention projections and lm head.
    #[serde(rename = "4bit-dense4")]
    Bits4Dense4,
}

impl Precision {
    /// All of them, `stored` first.
    pub const ALL: [Self; 7] = [
        Self::Stored,
        Self::Bits4,
        Self::Bits8,
        Self::Bits16,
        Self::Experts8,
        Self::Bits4Dense8,
        Self::Bits4Dense4,
    ];

    /// Those that name formats: all but `stored`.
    pub const POLICIES: [Self; 6] = [
        Self::Bits4,
        Self::Bits8,
        Self::Bits16,
        Self::Experts8,
        Self::Bits4Dense8,
        Self::Bits4Dense4,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Bits4 => "4bit",
            Self::Bits8 => "8bit",
            Self::Bits16 => "16bit",
            Self::Experts8 => "experts8",
            Self::Bits4Dense8 => "4bit-dense8",
            Self::Bits4Dense4 => "4bit-dense4",
        }
    }

    /// The formats of a checkpoint whose experts are stored as `experts` and whose vectors take
    /// `vectors`.
    pub fn formats(self, experts: MatrixFormat, vectors: VectorFormat) -> WeightFormat {
        use MatrixFormat::{Bf16, Mxfp4, Mxint8};
        let (experts, dense) = match self {
            Self::Stored => (experts, Bf16),
            Self::Bits4 => (Mxfp4, Bf16),
            Self::Bits8 => (Mxint8, Mxint8),
            Self::Bits16 => (Bf16, Bf16),
            Self::Experts8 => (Mxint8, Bf16),
            Self::Bits4Dense8 => (Mxfp4, Mxint8),
            Self::Bits4Dense4 => (Mxfp4, Mxfp4),
        };
        WeightFormat {
            experts,
            attention: dense,
            lm_head: dense,
            vectors,
        }
    }
}

/// The format of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MatrixFormat {
    Mxfp4,
    Mxint8,
    Bf16,
}

impl MatrixFormat {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mxfp4 => "mxfp4",
            Self::Mxint8 => "mxint8",
            Self::Bf16 => "bf16",
        }
    }

    /// Whether every value of a format is exact in this one, whatever the values are: the formats
    /// widen in the order MXFP4, MXINT8, bf16.
    pub const fn holds(self, stored: Self) -> bool {
        matches!(
            (stored, self),
            (Self::Mxfp4, _) | (Self::Mxint8, Self::Mxint8 | Self::Bf16) | (Self::Bf16, Self::Bf16)
        )
    }
}

/// The format of norms, biases and sinks: f32 when the checkpoint stores any of them so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VectorFormat {
    Bf16,
    F32,
}

impl VectorFormat {
    pub const fn n_bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// The formats of a loaded model; router and embedding are bf16 always.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct WeightFormat {
    pub experts: MatrixFormat,
    /// q, k, v and out projections.
    pub attention: MatrixFormat,
    pub lm_head: MatrixFormat,
    pub vectors: VectorFormat,
}

impl WeightFormat {
    /// The matrices' format of a class by its name in [`ClassBytes::classes`].
    pub fn of_class(&self, class: &str) -> MatrixFormat {
        match class {
            "experts" => self.experts,
            "attention" => self.attention,
            "lm_head" => self.lm_head,
            _ => MatrixFormat::Bf16,
        }
    }
}

/// A number for each class of tensors. Biases and sinks count with their matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ByClass<T> {
    pub experts: T,
    pub attention: T,
    pub router: T,
    pub norms: T,
    pub embedding: T,
    pub lm_head: T,
}

/// Bytes by tensor class.
pub type ClassBytes = ByClass<u64>;

impl<T: Copy> ByClass<T> {
    /// Name and value of each class.
    pub fn classes(&self) -> [(&'static str, T); 6] {
        [
            ("experts", self.experts),
            ("attention", self.attention),
            ("router", self.router),
            ("norms", self.norms),
            ("embedding", self.embedding),
            ("lm_head", self.lm_head),
        ]
    }
}

impl ClassBytes {
    pub fn total(&self) -> u64 {
        self.classes().iter().map(|(_, n_bytes)| n_bytes).sum()
    }
}

/// What a change of format did to the values of a class: sums over the changed matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Deviation {
    /// Sum of squared differences.
    pub error: f64,
    /// Sum of squared values.
    pub values: f64,
}

impl Deviation {
    /// Adds one value and what became of it.
    #[inline(always)]
    pub fn add(&mut self, value: f32, held: f32) {
        let (value, held) = (f64::from(value), f64::from(held));
        self.error += (value - held) * (value - held);
        self.values += value * value;
    }

    /// Root of the mean squared error over the root mean square; 0 where nothing changed.
    pub fn relative(&self) -> f64 {
        if self.error == 0.0 {
            return 0.0;
        }
        (self.error / self.values).sqrt()
    }
}

impl std::ops::AddAssign for Deviation {
    fn add_assign(&mut self, other: Self) {
        self.error += other.error;
        self.values += other.values;
    }
}

impl Checkpoint {
    /// The formats in which this checkpoint is held at a precision.
    pub fn weight_format(&self, precision: Precision) -> WeightFormat {
        precision.formats(self.expert_format, self.vector_format)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_names_the_format_of_each_class() {
        let of = |precision: Precision| {
            let format = precision.formats(MatrixFormat::Mxfp4, VectorFormat::Bf16);
            [format.experts, format.attention, format.lm_head].map(MatrixFormat::name)
        };
        assert_eq!(of(Precision::Stored), ["mxfp4", "bf16", "bf16"]);
        assert_eq!(of(Precision::Bits4), ["mxfp4", "bf16", "bf16"]);
        assert_eq!(of(Precision::Bits8), ["mxint8", "mxint8", "mxint8"]);
        assert_eq!(of(Precision::Bits16), ["bf16", "bf16", "bf16"]);
        assert_eq!(of(Precision::Experts8), ["mxint8", "bf16", "bf16"]);
        assert_eq!(of(Precision::Bits4Dense8), ["mxfp4", "mxint8", "mxint8"]);
        assert_eq!(of(Precision::Bits4Dense4), ["mxfp4", "mxfp4", "mxfp4"]);
    }

    #[test]
    fn a_deviation_is_relative_to_the_values() {
        let mut deviation = Deviation::default();
        assert_eq!(deviation.relative(), 0.0);
        deviation.add(3.0, 3.0);
        assert_eq!(deviation.relative(), 0.0);
        deviation.add(4.0, 4.5);
        assert_eq!(deviation.relative(), 0.1);
    }
}
