//! Numbers as people and models write them: `1,450`, `-3.50`, `$18`, `−7`, `3/4`, `6.02e23`.

/// A number found in a text.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// Byte span, sign included.
    pub span: [usize; 2],
    pub number: Number,
}

/// A number's value, exact for any count of digits.
#[derive(Clone, Debug, PartialEq)]
pub struct Number {
    /// Plain decimal spelling: no separators, no leading or trailing zeros, no `-0`.
    pub text: String,
    pub value: f64,
}

impl Number {
    pub fn is_whole(&self) -> bool {
        !self.text.contains(['.', 'e', '/'])
    }
}

/// The whole text as one number; currency and percent signs are let pass, `\frac{1}{2}` is `1/2`.
pub fn parse(text: &str) -> Option<Number> {
    let plain = latex_fraction(text.trim());
    let text = plain.as_deref().unwrap_or(text);
    let text = text
        .trim()
        .trim_start_matches(['$', '€', '£', '\\'])
        .trim_end_matches(['.', '%', '$', '€', '£', '\\'])
        .trim();
    let bytes_after_sign = text
        .trim_start_matches(['-', '+', '−'])
        .trim_start_matches(['$', '€']);
    let sign = text.starts_with(['-', '−']);
    let (length, mut number) = scan(bytes_after_sign)?;
    if length != bytes_after_sign.len() {
        return None;
    }
    if sign {
        negate(&mut number);
    }
    Some(number)
}

/// `-\frac{3}{4}` as `-3/4`.
fn latex_fraction(text: &str) -> Option<String> {
    let (sign, rest) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text),
    };
    let rest = ["\\frac{", "\\dfrac{", "\\tfrac{"]
        .iter()
        .find_map(|open| rest.strip_prefix(open))?;
    let (above, below) = rest.strip_suffix('}')?.split_once("}{")?;
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    (is_digits(above) && is_digits(below)).then(|| format!("{sign}{above}/{below}"))
}

/// All numbers of a text, in order. A digit inside a word (`x2`, `GPT4`) is none.
pub fn find_all(text: &str) -> Vec<Found> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(rest) = text.get(at..)
        && let Some(skip) = rest.find(|c: char| c.is_ascii_digit())
    {
        let mut from = at + skip;
        let before = text.get(..from).unwrap_or_default();
        // `.5`, but not the `5` of `v.5` or `1.2.5`.
        if let Some(stem) = before.strip_suffix('.')
            && !stem.ends_with(|c: char| c.is_alphanumeric() || c == '.')
        {
            from -= 1;
        }
        let before = text.get(..from).unwrap_or_default();
        let rest = text.get(from..).unwrap_or_default();
        let Some((length, mut number)) = scan(rest) else {
            at = from + 1;
            continue;
        };
        at = from + length;
        if before.ends_with(|c: char| c.is_alphabetic() || c == '_') {
            continue;
        }
        let mut start = from;
        let unsigned = before.trim_end_matches(['$', '€', '£', '\\']);
        if let Some(stem) = unsigned.strip_suffix(['-', '−'])
            && !stem.ends_with(|c: char| c.is_alphanumeric() || matches!(c, ')' | ']'))
        {
            negate(&mut number);
            start = stem.len();
        }
        found.push(Found {
            span: [start, at],
            number,
        });
    }
    found
}

fn negate(number: &mut Number) {
    if number.value != 0.0 {
        number.value = -number.value;
        number.text.insert(0, '-');
    }
}

/// The unsigned number a text begins with, and its length in bytes.
fn scan(text: &str) -> Option<(usize, Number)> {
    let bytes = text.as_bytes();
    let digits_at = |at: usize| {
        bytes
            .get(at..)
            .unwrap_or_default()
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .count()
    };
    let byte = |at: usize| bytes.get(at).copied();
    let mut end = digits_at(0);
    let mut whole: String = text.get(..end)?.to_owned();
    // Thousands: groups of exactly three after one to three digits, parted by `,` or `{,}`.
    if (1..=3).contains(&end) {
        loop {
            let rest = text.get(end..)?;
            let separator = if rest.starts_with("{,}") {
                3
            } else if rest.starts_with(',') {
                1
            } else {
                break;
            };
            if digits_at(end + separator) != 3 {
                break;
            }
            whole.push_str(text.get(end + separator..end + separator + 3)?);
            end += separator + 3;
        }
    }
    let mut fraction = "";
    if byte(end) == Some(b'.') {
        let n_digits = digits_at(end + 1);
        if n_digits > 0 {
            fraction = text.get(end + 1..end + 1 + n_digits)?;
            end += 1 + n_digits;
        }
    }
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let whole = whole.trim_start_matches('0');
    let fraction = fraction.trim_end_matches('0');
    let whole = if whole.is_empty() { "0" } else { whole };
    let mut spelled = whole.to_owned();
    if !fraction.is_empty() {
        spelled = format!("{whole}.{fraction}");
    }
    let mut value: f64 = spelled.parse().ok()?;
    if matches!(byte(end), Some(b'e' | b'E')) {
        let n_sign = usize::from(matches!(byte(end + 1), Some(b'+' | b'-')));
        let n_digits = digits_at(end + 1 + n_sign);
        let exponent = text.get(end + 1..end + 1 + n_sign + n_digits)?;
        if n_digits > 0 {
            let power = exponent.trim_start_matches('+');
            value = format!("{spelled}e{power}").parse().ok()?;
            end += 1 + n_sign + n_digits;
            spelled = exponential(&spelled, value, power);
        }
    } else if byte(end) == Some(b'/') && fraction.is_empty() {
        let n_digits = digits_at(end + 1);
        let below = text.get(end + 1..end + 1 + n_digits)?;
        if let Ok(divisor) = below.parse::<f64>()
            && divisor != 0.0
            && byte(end + 1 + n_digits) != Some(b'/')
        {
            value /= divisor;
            end += 1 + n_digits;
            spelled = if value.fract() == 0.0 && value < 1e15 {
                format!("{value:.0}")
            } else {
                format!("{spelled}/{below}")
            };
        }
    }
    // `3 1/2` is one number: a whole one and a proper fraction.
    else if byte(end) == Some(b' ') && fraction.is_empty() {
        let n_above = digits_at(end + 1);
        let n_below = digits_at(end + 2 + n_above);
        let above = text.get(end + 1..end + 1 + n_above)?;
        if byte(end + 1 + n_above) == Some(b'/')
            && let Some(below) = text.get(end + 2 + n_above..end + 2 + n_above + n_below)
            && let (Ok(above_value), Ok(below_value)) = (above.parse::<f64>(), below.parse::<f64>())
            && above_value > 0.0
            && above_value < below_value
            && !matches!(byte(end + 2 + n_above + n_below), Some(b'/' | b'.'))
        {
            value += above_value / below_value;
            end += 2 + n_above + n_below;
            spelled = format!("{spelled} {above}/{below}");
        }
    }
    Some((
        end,
        Number {
            text: spelled,
            value,
        },
    ))
}

/// `1e3` as `1000` where the value is a whole number that f64 holds exactly.
fn exponential(mantissa: &str, value: f64, power: &str) -> String {
    if value.fract() == 0.0 && value.abs() < 1e15 {
        format!("{value:.0}")
    } else {
        format!("{mantissa}e{power}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_number_are_one_number() {
        for (text, spelled) in [
            ("18", "18"),
            (" 018 ", "18"),
            ("1,450", "1450"),
            ("1{,}450", "1450"),
            ("12,345,678.90", "12345678.9"),
            ("$18.00", "18"),
            ("-$5", "-5"),
            ("−7", "-7"),
            ("+7", "7"),
            ("-0", "0"),
            (".5", "0.5"),
            ("50%", "50"),
            ("\\$3", "3"),
            ("3/4", "3/4"),
            ("\\frac{3}{4}", "3/4"),
            ("6/3", "2"),
            ("1e3", "1000"),
            ("6.02e23", "6.02e23"),
            ("12345678901234567890", "12345678901234567890"),
        ] {
            assert_eq!(
                parse(text).map(|it| it.text).as_deref(),
                Some(spelled),
                "{text}"
            );
        }
        for text in [
            "", "x", "1,45", "1 2", "1-2", "3 apples", "1.2.3", "1e", "-", "1/0",
        ] {
            assert!(parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn numbers_are_found_where_they_stand() {
        for (text, found) in [
            ("3-4", vec!["3", "4"]),
            ("3 - -4", vec!["3", "-4"]),
            ("35, 22, 1,450", vec!["35", "22", "1450"]),
            ("1,2,3", vec!["1", "2", "3"]),
            ("x2 = 5.", vec!["5"]),
            ("v1.5 of GPT4", vec![]),
            ("(-3)", vec!["-3"]),
            ("costs -$1,200.50!", vec!["-1200.5"]),
            ("about .25 or 3/4", vec!["0.25", "3/4"]),
            (
                "2024-06-30",
                vec!["2024", "06", "30"]
                    .into_iter()
                    .map(|it| it.trim_start_matches('0'))
                    .collect(),
            ),
            ("é7 ７", vec![]),
        ] {
            let all: Vec<String> = find_all(text)
                .into_iter()
                .map(|it| it.number.text)
                .collect();
            assert_eq!(all, found, "{text}");
        }
        let found = find_all("is −12.");
        assert_eq!(found.first().map(|it| it.span), Some([3, 8]));
    }
}
