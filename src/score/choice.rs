//! Which option a piece of text names.

use super::metric::normalize;

/// What a text says about the options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// It names this one.
    Option(usize),
    /// It names something that is not an option: a letter past the last, or several letters.
    Outside,
    /// It names none.
    Unclear,
}

/// The letter of an option; a number from the 27th on.
pub fn letter(index: usize) -> String {
    match u8::try_from(index) {
        Ok(offset) if offset < 26 => char::from(b'A' + offset).to_string(),
        _ => (index + 1).to_string(),
    }
}

/// Marks around an answer that are none of it.
pub fn is_wrapping(c: char) -> bool {
    c.is_whitespace() || matches!(c, '*' | '_' | '`' | '$' | '"' | '\'' | '“' | '”' | '#')
}

/// Resolves what stands where an answer is expected, such as `B`, `(b)`, `B. Rome`, `Rome`,
/// `option B`. Without options any letter counts.
pub fn resolve(content: &str, options: &[String]) -> Resolved {
    let content = content.trim_matches(is_wrapping);
    if content.is_empty() {
        return Resolved::Unclear;
    }
    if let Some(letter) = bare_letter(content) {
        return in_range(letter, options);
    }
    if let Some(index) = equal_option(content, options) {
        return Resolved::Option(index);
    }
    if let Some(found) = leading_letter(content, options) {
        return found;
    }
    if let Some(index) = leading_option(content, options) {
        return Resolved::Option(index);
    }
    if let Some(index) = contained_option(content, options) {
        return Resolved::Option(index);
    }
    match marked_letters(content).last() {
        Some(&(_, letter)) => in_range(letter, options),
        None => Resolved::Unclear,
    }
}

/// The only letter that a text is: `B`, `(b)`, `[B]`, `B.`, `\text{B}`.
pub fn bare_letter(text: &str) -> Option<char> {
    let text = text.trim();
    let text = ["\\text{", "\\textbf{", "\\mathrm{", "\\mathbf{", "{"]
        .iter()
        .find_map(|open| text.strip_prefix(open)?.strip_suffix('}'))
        .unwrap_or(text);
    let mut letters = text
        .trim_matches(|c: char| {
            is_wrapping(c) || matches!(c, '(' | ')' | '[' | ']' | '.' | ':' | ',')
        })
        .chars();
    let letter = letters.next().filter(char::is_ascii_alphabetic)?;
    letters
        .next()
        .is_none()
        .then(|| letter.to_ascii_uppercase())
}

/// Letters that are marked as an option's: in brackets, in bold, before `.`, `)` or `:`, behind
/// `option` or `choice`, or alone on a line. With byte offsets, in order.
pub fn marked_letters(text: &str) -> Vec<(usize, char)> {
    let mut found = Vec::new();
    let word = |c: char| c.is_alphanumeric() || c == '_';
    for (at, letter) in text.char_indices() {
        if !letter.is_ascii_alphabetic() {
            continue;
        }
        let before = text.get(..at).unwrap_or_default();
        let after = text.get(at + 1..).unwrap_or_default();
        if before.ends_with(word) || after.starts_with(word) || after.starts_with(['\'', '’']) {
            continue;
        }
        let in_brackets = before.ends_with(['(', '[', '{']) && after.starts_with([')', ']', '}']);
        let in_bold = before.ends_with("**") && after.starts_with("**");
        let is_capital = letter.is_ascii_uppercase();
        let at_line_start = before
            .rsplit('\n')
            .next()
            .is_none_or(|line| line.chars().all(is_wrapping));
        let at_line_end = after.split('\n').next().is_none_or(|line| {
            line.chars()
                .all(|c| is_wrapping(c) || matches!(c, '.' | ')'))
        });
        let heads_item = is_capital
            && after.starts_with(['.', ')', ':'])
            && (at_line_start || after.starts_with(") "));
        let behind_word = is_capital
            && before
                .trim_end_matches(|c: char| is_wrapping(c) || c == '(')
                .to_ascii_lowercase()
                .ends_with_any(&["option", "choice", "answer", "answer is", "answer:"]);
        let concludes = is_capital && at_sentence_end(after) && behind_conclusion(before);
        if in_brackets
            || in_bold
            || heads_item
            || behind_word
            || concludes
            || (at_line_start && at_line_end)
        {
            found.push((at, letter.to_ascii_uppercase()));
        }
    }
    found
}

/// Whether nothing but marks stands before a sentence's end.
fn at_sentence_end(after: &str) -> bool {
    let rest = after.trim_start_matches(|c: char| is_wrapping(c) && c != '\n');
    rest.is_empty()
        || rest.starts_with('\n')
        || rest
            .strip_prefix(['.', '!'])
            .is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace))
}

/// Whether the word before a letter leads to a conclusion: `so it's B`, `I'd go with B`,
/// `therefore, B`. Other words do not: `hepatitis B`.
fn behind_conclusion(before: &str) -> bool {
    const WORDS: [&str; 24] = [
        "is",
        "it's",
        "that's",
        "be",
        "therefore",
        "thus",
        "hence",
        "so",
        "think",
        "believe",
        "guess",
        "say",
        "choose",
        "chose",
        "pick",
        "picked",
        "select",
        "selected",
        "with",
        "option",
        "choice",
        "letter",
        "answer",
        "for",
    ];
    let before = before.trim_end_matches(|c: char| is_wrapping(c) || ",:-–—(".contains(c));
    let word = before
        .rsplit(|c: char| !(c.is_alphanumeric() || c == '\'' || c == '’'))
        .next()
        .unwrap_or_default();
    let word = word.to_lowercase().replace('’', "'");
    WORDS.contains(&word.as_str())
}

/// The option that a text begins with, set off from the rest: `Yes, because there is no doubt`.
fn leading_option(content: &str, options: &[String]) -> Option<usize> {
    let lower = content.to_lowercase();
    let begins = |option: &String| {
        let option = option.trim().to_lowercase();
        let rest = lower.strip_prefix(&option).filter(|_| !option.is_empty())?;
        let is_set_off = rest.starts_with([',', '.', ';', ':', '!'])
            && !rest[1..].starts_with(|c: char| c.is_alphanumeric());
        (is_set_off || rest.starts_with(" because ")).then_some(option.len())
    };
    let lengths = options.iter().enumerate();
    let lengths = lengths.filter_map(|(index, option)| Some((begins(option)?, index)));
    lengths.max().map(|(_, index)| index)
}

/// The option whose text is the only one to stand in `text`; one inside a longer one that stands
/// there, too, does not count.
pub fn contained_option(text: &str, options: &[String]) -> Option<usize> {
    let hits = contained_spans(text, options);
    let mut outer = hits.iter().filter(|(_, span)| {
        !hits
            .iter()
            .any(|(_, it)| it != span && it[0] <= span[0] && span[1] <= it[1])
    });
    let (index, _) = outer.next()?;
    outer.all(|(other, _)| other == index).then_some(*index)
}

/// Where option texts stand in a text, whole words and without case.
fn contained_spans(text: &str, options: &[String]) -> Vec<(usize, [usize; 2])> {
    let text = text.to_lowercase();
    let mut hits = Vec::new();
    for (index, option) in options.iter().enumerate() {
        let option = option.trim().to_lowercase();
        if option.is_empty() {
            continue;
        }
        for (at, _) in text.match_indices(&option) {
            let end = at + option.len();
            let before = text.get(..at).unwrap_or_default();
            let after = text.get(end..).unwrap_or_default();
            let is_denied = ["not ", "n't ", "n’t ", "not a ", "not the "]
                .iter()
                .any(|it| before.ends_with(it));
            if is_whole(before, &option, after) && !is_denied {
                hits.push((index, [at, end]));
            }
        }
    }
    hits
}

/// Whether a match is no part of a longer word or number.
fn is_whole(before: &str, matched: &str, after: &str) -> bool {
    let digit_first = matched.starts_with(|c: char| c.is_ascii_digit());
    let digit_last = matched.ends_with(|c: char| c.is_ascii_digit());
    let number_goes_on = |rest: &str| {
        let mut chars = rest.chars();
        matches!(chars.next(), Some('.' | ',' | '/'))
            && chars.next().is_some_and(|c| c.is_ascii_digit())
    };
    let number_began = || {
        let mut chars = before.chars().rev();
        match chars.next() {
            Some('.' | ',' | '/') => chars.next().is_some_and(|c| c.is_ascii_digit()),
            Some('-' | '−') => !chars.next().is_some_and(char::is_alphanumeric),
            _ => false,
        }
    };
    let joins_before =
        matched.starts_with(char::is_alphanumeric) && before.ends_with(char::is_alphanumeric);
    let joins_after =
        matched.ends_with(char::is_alphanumeric) && after.starts_with(char::is_alphanumeric);
    !(joins_before
        || joins_after
        || (digit_first && number_began())
        || (digit_last && number_goes_on(after)))
}

fn in_range(letter: char, options: &[String]) -> Resolved {
    let index = usize::from((letter as u8).wrapping_sub(b'A'));
    if index < options.len() || options.is_empty() {
        Resolved::Option(index)
    } else {
        Resolved::Outside
    }
}

fn equal_option(content: &str, options: &[String]) -> Option<usize> {
    let trimmed = content.trim();
    let exact = options.iter().position(|option| option.trim() == trimmed);
    exact.or_else(|| {
        let content = normalize(content);
        let mut equal = options
            .iter()
            .enumerate()
            .filter(|(_, option)| normalize(option) == content);
        let (index, _) = equal.next()?;
        equal.next().is_none().then_some(index)
    })
}

/// A letter that a text begins with: `B. Rome`, `(B) Rome`, `option B`, `B because …`.
fn leading_letter(content: &str, options: &[String]) -> Option<Resolved> {
    let lower = content.to_ascii_lowercase();
    let mut text = content;
    let mut is_named = false;
    for word in [
        "the ", "correct ", "option ", "choice ", "letter ", "answer ",
    ] {
        if lower.get(content.len() - text.len()..)?.starts_with(word) {
            text = text.get(word.len()..)?;
            is_named = word != "the ";
        }
    }
    let text = text.trim_start_matches(is_wrapping);
    let opened = text.starts_with(['(', '[']);
    let text = text.trim_start_matches(['(', '[']);
    let letter = text.chars().next().filter(char::is_ascii_alphabetic)?;
    let rest = text.get(1..)?;
    let closed = rest.starts_with([')', ']']);
    let rest_text = rest.trim_start_matches(|c: char| is_wrapping(c) || matches!(c, ')' | ']'));
    if rest.starts_with(|c: char| c.is_alphanumeric() || matches!(c, '\'' | '’' | '-' | '_' | '('))
    {
        return None;
    }
    let is_marked =
        (opened && closed) || is_named || rest.starts_with(['.', ')', ':', ',', '*', ';']);
    let may_be_small = closed && (opened || rest.starts_with(')'));
    if !letter.is_ascii_uppercase() && !may_be_small {
        return None;
    }
    // `A dog` and `I think` begin with words.
    let next = rest_text.split_whitespace().next().unwrap_or_default();
    let says_why = [
        "because", "since", "as", "is", "-", "–", "—", "and", "or", "(",
    ];
    if matches!(letter, 'A' | 'I') && !is_marked && !says_why.contains(&next) {
        return None;
    }
    if names_second(rest_text) {
        return Some(Resolved::Outside);
    }
    Some(in_range(letter.to_ascii_uppercase(), options))
}

/// Whether another letter follows: `and C`, `, C`, `or (C)`.
fn names_second(rest: &str) -> bool {
    let rest = rest.trim_start();
    let after = ["and ", "or ", ",", "&", "/"]
        .iter()
        .find_map(|joint| rest.strip_prefix(joint));
    let Some(after) = after else {
        return false;
    };
    let word = after.split_whitespace().next().unwrap_or_default();
    word.chars().any(char::is_uppercase) && bare_letter(word).is_some()
}

trait EndsWithAny {
    fn ends_with_any(&self, ends: &[&str]) -> bool;
}

impl EndsWithAny for String {
    fn ends_with_any(&self, ends: &[&str]) -> bool {
        ends.iter().any(|end| self.ends_with(end))
    }
}
