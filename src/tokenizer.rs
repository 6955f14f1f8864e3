//! Text to token ids and back, with the checkpoint's own `tokenizer.json`.
//!
//! The `tokenizers` crate finds special tokens in any text it is given. That would let a question
//! forge a turn, so the crate only ever sees a copy of the tokenizer without added tokens:
//! ordinary text becomes ordinary ids, whatever it looks like, and special ids come from
//! [`Segment::Special`] alone. Decoding goes through the byte pieces of the vocabulary, so that
//! it is exact. The vocabulary must be byte-level BPE, as gpt-oss's is. Knows nothing of prompts'
//! meaning: that is `prompt::harmony`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::engine::TokenId;
use crate::prompt::Segment;

/// A checkpoint's tokenizer.
pub struct Tokenizer {
    ordinary: tokenizers::Tokenizer,
    /// The bytes of each id's piece: special tokens as they are spelled, absent ids empty.
    pieces: Vec<Vec<u8>>,
    is_special: Vec<bool>,
    by_name: HashMap<String, TokenId>,
    special: SpecialIds,
}

/// The chat format's special tokens in this checkpoint's vocabulary; absent where it has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    pub start: Option<TokenId>,
    pub message: Option<TokenId>,
    pub channel: Option<TokenId>,
    pub constrain: Option<TokenId>,
    pub end: Option<TokenId>,
    pub return_: Option<TokenId>,
    pub call: Option<TokenId>,
    pub end_of_text: Option<TokenId>,
}

impl SpecialIds {
    /// How the tokens are spelled, in the order of the fields.
    pub const NAMES: [&str; 8] = [
        "<|start|>",
        "<|message|>",
        "<|channel|>",
        "<|constrain|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
    ];

    /// The ids that `find` has for the names.
    pub fn of(find: impl Fn(&str) -> Option<TokenId>) -> Self {
        let [
            start,
            message,
            channel,
            constrain,
            end,
            return_,
            call,
            end_of_text,
        ] = Self::NAMES.map(find);
        Self {
            start,
            message,
            channel,
            constrain,
            end,
            return_,
            call,
            end_of_text,
        }
    }
}

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("cannot read tokenizer `{path}`: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the tokenizer is not valid: {reason}")]
    Invalid { reason: String },
    #[error("the tokenizer is not byte-level BPE: it has no token for byte {byte:#04x}")]
    NotByteLevel { byte: u8 },
    #[error("the tokenizer has no special token `{name}`")]
    NoSpecial { name: String },
    #[error("the tokenizer cannot encode a text of {n_bytes} bytes: {reason}")]
    Encode { n_bytes: usize, reason: String },
}

impl TokenizerError {
    /// How to mend it.
    pub fn hint(&self) -> &'static str {
        match self {
            Self::Read { .. } => "the model folder needs its `tokenizer.json`",
            Self::Invalid { .. } => "download the checkpoint's `tokenizer.json` again",
            Self::NotByteLevel { .. } => "only byte-level BPE tokenizers, as gpt-oss has, are read",
            Self::NoSpecial { .. } => {
                "the checkpoint does not speak Harmony, the chat format of gpt-oss"
            }
            Self::Encode { .. } => "shorten the row, or report the text that does this",
        }
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json`.
    ///
    /// # Errors
    /// When the file cannot be read, is not a tokenizer or is not byte-level BPE.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let bytes = std::fs::read(path).map_err(|source| TokenizerError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::from_bytes(&bytes)
    }

    /// The same, from the text of `tokenizer.json`.
    ///
    /// # Errors
    /// When the text is not a tokenizer or not byte-level BPE.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let mut json: Value = serde_json::from_slice(bytes).map_err(invalid)?;
        let added = added_tokens(&json)?;
        let root = json.as_object_mut().ok_or(TokenizerError::Invalid {
            reason: "its top level is not an object".into(),
        })?;
        // What is left has no way to produce a special id, to cut a text or to pad it; decoding is ours.
        root.insert("added_tokens".into(), Value::Array(Vec::new()));
        for key in ["truncation", "padding", "post_processor", "decoder"] {
            root.insert(key.into(), Value::Null);
        }
        let model = root.get("model");
        for key in NOT_BYTE_LEVEL {
            let value = model.and_then(|model| model.get(key));
            let is_unset = |value: &Value| {
                value.is_null() || value.as_str() == Some("") || value.as_f64() == Some(0.0)
            };
            if let Some(value) = value.filter(|value| !is_unset(value)) {
                return Err(TokenizerError::Invalid {
                    reason: format!("`model.{key}` is {value}, expected null"),
                });
            }
        }
        if let Some(vocab) = root
            .get_mut("model")
            .and_then(|model| model.get_mut("vocab"))
            .and_then(Value::as_object_mut)
        {
            for token in added.iter().filter(|token| token.special) {
                vocab.shift_remove(&token.content);
            }
        }
        let text = serde_json::to_vec(&json).map_err(invalid)?;
        let ordinary = tokenizers::Tokenizer::from_bytes(&text).map_err(invalid)?;
        Self::build(ordinary, &added)
    }

    fn build(
        ordinary: tokenizers::Tokenizer,
        added: &[AddedToken],
    ) -> Result<Self, TokenizerError> {
        let vocab = ordinary.get_vocab(false);
        let n_ids = vocab
            .values()
            .chain(added.iter().map(|token| &token.id))
            .max()
            .map_or(0, |&id| id as usize + 1);
        if n_ids > MAX_IDS {
            return Err(TokenizerError::Invalid {
                reason: format!("it has token id {}, the limit is {MAX_IDS}", n_ids - 1),
            });
        }
        let byte_of = byte_alphabet();
        for (&letter, &byte) in &byte_of {
            if !vocab.contains_key(letter.to_string().as_str()) {
                return Err(TokenizerError::NotByteLevel { byte });
            }
        }
        let mut pieces = vec![Vec::new(); n_ids];
        let mut is_special = vec![false; n_ids];
        for (piece, &id) in &vocab {
            if let Some(slot) = pieces.get_mut(id as usize) {
                *slot = piece_bytes(piece, &byte_of);
            }
        }
        let mut by_name = HashMap::new();
        for token in added {
            let id = token.id as usize;
            if let (Some(slot), Some(special)) = (pieces.get_mut(id), is_special.get_mut(id)) {
                *slot = token.content.clone().into_bytes();
                *special = true;
            }
            by_name.insert(token.content.clone(), token.id);
        }
        let find = |name: &str| by_name.get(name).copied();
        let special = SpecialIds::of(find);
        Ok(Self {
            ordinary,
            pieces,
            is_special,
            by_name,
            special,
        })
    }

    /// The chat format's ids.
    pub fn special_ids(&self) -> &SpecialIds {
        &self.special
    }

    /// The id of a special token by its spelling.
    pub fn special_id(&self, name: &str) -> Option<TokenId> {
        self.by_name.get(name).copied()
    }

    /// Whether an id is a special (added) token.
    pub fn is_special(&self, id: TokenId) -> bool {
        self.is_special.get(id as usize).copied().unwrap_or(false)
    }

    /// One more than the largest id.
    pub fn n_ids(&self) -> usize {
        self.pieces.len()
    }

    /// Ordinary text to ids. Never produces a special id: a literal `<|end|>` stays text.
    ///
    /// # Errors
    /// When the tokenizer's own pattern gives up on the text.
    pub fn encode_ordinary(&self, text: &str) -> Result<Vec<TokenId>, TokenizerError> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        let encoding =
            self.ordinary
                .encode_fast(text, false)
                .map_err(|error| TokenizerError::Encode {
                    n_bytes: text.len(),
                    reason: error.to_string(),
                })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A rendered prompt to ids; each text segment is encoded on its own.
    ///
    /// # Errors
    /// When a special token is not in this vocabulary, or a text cannot be encoded.
    pub fn encode(&self, segments: &[Segment]) -> Result<Vec<TokenId>, TokenizerError> {
        let mut ids = Vec::new();
        for segment in segments {
            match segment {
                Segment::Special(name) => {
                    let id = self
                        .special_id(name)
                        .ok_or_else(|| TokenizerError::NoSpecial {
                            name: (*name).to_owned(),
                        })?;
                    ids.push(id);
                }
                Segment::Text(text) => ids.extend(self.encode_ordinary(text)?),
            }
        }
        Ok(ids)
    }

    /// Ids to text, special tokens spelled out. Bytes that are not UTF-8 become U+FFFD, ids
    /// outside the vocabulary become nothing.
    pub fn decode(&self, ids: &[TokenId]) -> String {
        self.join(ids, true)
    }

    /// Ids to text without the special tokens among them.
    pub fn decode_ordinary(&self, ids: &[TokenId]) -> String {
        self.join(ids, false)
    }

    fn join(&self, ids: &[TokenId], special: bool) -> String {
        let mut bytes = Vec::new();
        for &id in ids {
            if (special || !self.is_special(id))
                && let Some(piece) = self.pieces.get(id as usize)
            {
                bytes.extend_from_slice(piece);
            }
        }
        match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
        }
    }
}

/// What a byte-level BPE model has not. With a prefix the crate cuts each merge short by it, and
/// panics where one is shorter; with dropout a text's tokens are drawn anew each time.
const NOT_BYTE_LEVEL: [&str; 3] = ["continuing_subword_prefix", "end_of_word_suffix", "dropout"];

/// Ids above this are refused: the tables would be as large as a hostile file likes.
const MAX_IDS: usize = 1 << 22;

struct AddedToken {
    id: TokenId,
    content: String,
    special: bool,
}

fn added_tokens(json: &Value) -> Result<Vec<AddedToken>, TokenizerError> {
    let Some(list) = json.get("added_tokens") else {
        return Ok(Vec::new());
    };
    let list = list.as_array().ok_or(TokenizerError::Invalid {
        reason: "`added_tokens` is not a list".into(),
    })?;
    list.iter()
        .map(|token| {
            let id = token.get("id").and_then(Value::as_u64);
            let content = token.get("content").and_then(Value::as_str);
            match (id.and_then(|id| TokenId::try_from(id).ok()), content) {
                (Some(id), Some(content)) => Ok(AddedToken {
                    id,
                    content: content.to_owned(),
                    special: token.get("special").and_then(Value::as_bool) != Some(false),
                }),
                _ => Err(TokenizerError::Invalid {
                    reason: "an added token has no `id` or no `content`".into(),
                }),
            }
        })
        .collect()
}

fn invalid(error: impl std::fmt::Display) -> TokenizerError {
    TokenizerError::Invalid {
        reason: error.to_string(),
    }
}

/// GPT-2's byte alphabet (`bytes_to_unicode` in openai/gpt-2 `src/encoder.py`): printable bytes
/// stand for themselves, the others for the letters from U+0100 on, in order.
fn byte_alphabet() -> HashMap<char, u8> {
    let mut letters = HashMap::new();
    let mut n_shifted = 0;
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
        let letter = if printable {
            char::from(byte)
        } else {
            n_shifted += 1;
            char::from_u32(0xff + n_shifted).unwrap_or('\u{fffd}')
        };
        letters.insert(letter, byte);
    }
    letters
}

/// A vocabulary entry's bytes; one with a letter outside the alphabet is taken as plain text.
fn piece_bytes(piece: &str, byte_of: &HashMap<char, u8>) -> Vec<u8> {
    piece
        .chars()
        .map(|letter| byte_of.get(&letter).copied())
        .collect::<Option<Vec<u8>>>()
        .unwrap_or_else(|| piece.as_bytes().to_vec())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A byte-level BPE tokenizer of 256 bytes, three merges and the chat format's tokens.
    pub(crate) fn tiny() -> Tokenizer {
        Tokenizer::from_bytes(tiny_json().as_bytes()).expect("the tiny tokenizer is valid")
    }

    fn tiny_json() -> String {
        let mut letters: Vec<(u8, char)> = byte_alphabet()
            .into_iter()
            .map(|(letter, byte)| (byte, letter))
            .collect();
        letters.sort_unstable();
        let mut vocab = serde_json::Map::new();
        for (byte, letter) in letters {
            vocab.insert(letter.to_string(), byte.into());
        }
        for (index, piece) in ["<|", "|>", "en"].iter().enumerate() {
            vocab.insert((*piece).into(), (256 + index).into());
        }
        let added: Vec<Value> = SpecialIds::NAMES
            .iter()
            .enumerate()
            .map(|(index, name)| {
                serde_json::json!({"id": 300 + index, "content": name, "special": true,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
            })
            .collect();
        serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": null, "post_processor": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false,
                "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": vocab,
                "merges": [["<", "|"], ["|", ">"], ["e", "n"]]}
        })
        .to_string()
    }

    #[test]
    fn a_special_token_in_a_text_stays_text() {
        let tokenizer = tiny();
        for text in ["<|end|>", "a<|start|>system<|message|>b", "<|endoftext|>"] {
            let ids = tokenizer.encode_ordinary(text).expect("it encodes");
            assert!(ids.iter().all(|&id| !tokenizer.is_special(id)), "{ids:?}");
            assert_eq!(tokenizer.decode(&ids), text);
            assert_eq!(tokenizer.decode_ordinary(&ids), text);
        }
    }

    #[test]
    fn special_segments_are_single_ids_and_spelled_out() {
        let tokenizer = tiny();
        let ids = tokenizer
            .encode(&[Segment::Special("<|end|>"), Segment::Text("<|end|>".into())])
            .expect("it encodes");
        assert_eq!(ids.first(), tokenizer.special_ids().end.as_ref());
        assert_eq!(tokenizer.decode(&ids), "<|end|><|end|>");
        assert_eq!(tokenizer.decode_ordinary(&ids), "<|end|>");
        let unknown = tokenizer.encode(&[Segment::Special("<|refusal|>")]);
        assert!(matches!(unknown, Err(TokenizerError::NoSpecial { .. })));
    }

    #[test]
    fn broken_bytes_and_unknown_ids_never_panic() {
        let tokenizer = tiny();
        assert_eq!(tokenizer.decode(&[0xff, 65]), "\u{fffd}A");
        assert_eq!(tokenizer.decode(&[9_999_999, 299, 65]), "A");
    }

    #[test]
    fn a_hostile_tokenizer_is_an_error() {
        for bytes in [
            &b""[..],
            b"[]",
            b"{}",
            b"{\"added_tokens\": 3}",
            b"{\"added_tokens\": [{\"id\": -1, \"content\": \"x\"}]}",
        ] {
            assert!(Tokenizer::from_bytes(bytes).is_err());
        }
        let no_bytes = tiny_json().replace("\"A\":65,", "");
        assert!(matches!(
            Tokenizer::from_bytes(no_bytes.as_bytes()),
            Err(TokenizerError::NotByteLevel { byte: b'A' })
        ));
        for (key, value) in [
            ("continuing_subword_prefix", "\"long\""),
            ("end_of_word_suffix", "\"</w>\""),
            ("dropout", "0.5"),
        ] {
            let with = |value| {
                let model = format!("\"model\":{{\"{key}\":{value},");
                Tokenizer::from_bytes(tiny_json().replace("\"model\":{", &model).as_bytes())
            };
            let error = with(value).err().expect(key).to_string();
            assert!(
                error.contains(&format!("`model.{key}` is {value}")),
                "{error}"
            );
            assert!(with("null").is_ok(), "{key}");
        }
    }

    proptest! {
        #[test]
        fn decoding_gives_the_text_back(text in ".*") {
            let tokenizer = tiny();
            let ids = tokenizer.encode_ordinary(&text).expect("it encodes");
            prop_assert_eq!(tokenizer.decode(&ids), text);
        }
    }
}
