//! Words that pandas reads as a missing value, in quotes or not: one of them in a cell that must
//! hold something has had whole submissions rejected.

/// What `pandas.read_csv` takes for a missing value by default, but for the empty cell
/// (`STR_NA_VALUES` of pandas 2.3.3). A test holds it against pandas itself.
pub const NULL_WORDS: [&str; 18] = [
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
    "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
];

/// Whether a cell is read as missing although it holds something. Blanks around the word count as
/// nothing: many readers strip them.
pub fn is_null_word(text: &str) -> bool {
    NULL_WORDS.contains(&text.trim())
}

/// An answer that is such a word, with a full stop behind it: the least change that keeps it.
pub fn with_stop(word: &str) -> String {
    format!("{}.", word.trim())
}

/// Whether a cell is what [`with_stop`] makes.
pub fn has_stop(text: &str) -> bool {
    text.strip_suffix('.').is_some_and(is_null_word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_with_its_stop_is_none() {
        for word in NULL_WORDS {
            assert!(is_null_word(word) && !has_stop(word), "{word}");
            let mended = with_stop(word);
            assert!(!is_null_word(&mended) && has_stop(&mended), "{mended}");
        }
        assert!(is_null_word(" NA\n"));
        for other in ["", "none", "Na", "nothing", "nan nan", "NOTAVALUE"] {
            assert!(!is_null_word(other), "{other}");
        }
    }
}
