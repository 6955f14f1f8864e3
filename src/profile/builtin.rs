//! The profiles that come with podium: every file of `datasets/profiles/`.

/// Name and text of each.
macro_rules! builtin {
    ($($name:literal)*) => {
        &[$(($name, include_str!(concat!("../../datasets/profiles/", $name, ".toml")))),*]
    };
}

pub const BUILTIN: &[(&str, &str)] = builtin!(
    "qa" "choice" "nano"
    "aime" "aimo" "arc" "bbh" "curebench" "gpqa" "gsm8k" "humaneval" "medqa" "mmlu" "mmlu_pro" "reasoning_gym"
);
