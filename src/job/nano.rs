//! The model embedded in the binary: the files of `models/nano`, as they lie there.

/// Its name for `--model`.
pub const NANO: &str = "nano";

pub const CONFIG: &[u8] = include_bytes!("../../models/nano/config.json");
pub const GENERATION_CONFIG: &[u8] = include_bytes!("../../models/nano/generation_config.json");
pub const TOKENIZER_CONFIG: &[u8] = include_bytes!("../../models/nano/tokenizer_config.json");
pub const TOKENIZER: &[u8] = include_bytes!("../../models/nano/tokenizer.json");
pub const TENSORS: &[u8] = include_bytes!("../../models/nano/model.safetensors");
