//! In which format weights are held, and how many bytes each class of them takes.

use super::{Checkpoint, CheckpointError};

/// What the user asks for.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize,
)]
pub enum Precision {
    /// As the checkpoint stores it.
    #[default]
    #[serde(rename = "stored")]
    Stored,
    #[serde(rename = "4bit")]
    Bits4,
    #[serde(rename = "8bit")]
    Bits8,
    #[serde(rename = "16bit")]
    Bits16,
}

impl Precision {
    pub fn name(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Bits4 => "4bit",
            Self::Bits8 => "8bit",
            Self::Bits16 => "16bit",
        }
    }
}

/// The format of the experts' weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertFormat {
    Mxfp4,
    Bf16,
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

/// The formats of a loaded model; dense matrices are bf16.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct WeightFormat {
    pub experts: ExpertFormat,
    pub vectors: VectorFormat,
}

impl From<ExpertFormat> for WeightFormat {
    /// Vectors in bf16, as released.
    fn from(experts: ExpertFormat) -> Self {
        Self {
            experts,
            vectors: VectorFormat::Bf16,
        }
    }
}

/// Bytes by tensor class. Biases and sinks count with their matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ClassBytes {
    pub experts: u64,
    pub attention: u64,
    pub router: u64,
    pub norms: u64,
    pub embedding: u64,
    pub lm_head: u64,
}

impl ClassBytes {
    /// Name and bytes of each class.
    pub fn classes(&self) -> [(&'static str, u64); 6] {
        [
            ("experts", self.experts),
            ("attention", self.attention),
            ("router", self.router),
            ("norms", self.norms),
            ("embedding", self.embedding),
            ("lm_head", self.lm_head),
        ]
    }

    pub fn total(&self) -> u64 {
        self.classes().iter().map(|(_, n_bytes)| n_bytes).sum()
    }
}

impl Checkpoint {
    /// The formats in which this checkpoint is held at a precision.
    ///
    /// # Errors
    /// A precision that this version does not have.
    pub fn weight_format(&self, precision: Precision) -> Result<WeightFormat, CheckpointError> {
        let experts = match precision {
            Precision::Stored => self.expert_format,
            Precision::Bits4 => ExpertFormat::Mxfp4,
            Precision::Bits16 => ExpertFormat::Bf16,
            Precision::Bits8 => {
                return Err(CheckpointError::Precision {
                    asked: precision.name(),
                });
            }
        };
        Ok(WeightFormat {
            experts,
            vectors: self.vector_format,
        })
    }
}
