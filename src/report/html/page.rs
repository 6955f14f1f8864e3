//! A self-contained HTML document: style, scripts and data in one file, and a policy that lets
//! nothing else in.

use sha2::{Digest, Sha256};

const UPLOT_JS: &str = include_str!("assets/vendor/uPlot.iife.min.js");
const UPLOT_CSS: &str = include_str!("assets/vendor/uPlot.min.css");
const STYLE: &str = include_str!("assets/page.css");
const DOM_JS: &str = include_str!("assets/dom.js");
const CHARTS_JS: &str = include_str!("assets/charts.js");
const BARS_JS: &str = include_str!("assets/bars.js");
const ROWS_JS: &str = include_str!("assets/rows.js");
const DETAIL_JS: &str = include_str!("assets/detail.js");
const RUN_JS: &str = include_str!("assets/run.js");
const TABLES_JS: &str = include_str!("assets/tables.js");
const COMPARISON_JS: &str = include_str!("assets/comparison.js");

/// What a page shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Run,
    Comparison,
}

/// The whole document. `blocks` are the JSON texts that the scripts read, each by its element's
/// id; they may hold any text.
pub fn document(kind: Kind, title: &str, blocks: &[(&str, String)]) -> String {
    let own = match kind {
        Kind::Run => [ROWS_JS, DETAIL_JS, TABLES_JS, RUN_JS].join("\n"),
        Kind::Comparison => [DETAIL_JS, TABLES_JS, COMPARISON_JS].join("\n"),
    };
    // One scope for our files, none of it global.
    let script =
        format!("\"use strict\";(() => {{\n{DOM_JS}\n{CHARTS_JS}\n{BARS_JS}\n{own}\n}})();");
    let style = format!("{UPLOT_CSS}\n{STYLE}");
    let policy = format!(
        "default-src 'none'; script-src '{}' '{}'; style-src '{}'; base-uri 'none'; \
         form-action 'none'",
        source_hash(UPLOT_JS),
        source_hash(&script),
        source_hash(&style)
    );
    let title = escape(title);
    let mut html = String::with_capacity(
        UPLOT_JS.len() + blocks.iter().map(|(_, json)| json.len()).sum::<usize>() + 65_536,
    );
    html += "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n";
    html += &format!("<meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\">\n");
    html += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n\
             <meta name=\"referrer\" content=\"no-referrer\">\n";
    html += &format!("<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n");
    html += &format!(
        "<div id=\"page\"><noscript><h1>{title}</h1><p>This page draws itself with the script \
         it carries; allow scripts for this file to see it.</p></noscript></div>\n"
    );
    for (id, json) in blocks {
        html += &format!("<script type=\"application/json\" id=\"{id}\">");
        html += &embedded(json);
        html += "</script>\n";
    }
    html += &format!("<script>{UPLOT_JS}</script>\n<script>{script}</script>\n</body>\n</html>\n");
    html
}

/// JSON that may stand inside a script element: no `<` can end the element or open a comment.
/// In JSON that character occurs in strings alone, where the escape means the same.
fn embedded(json: &str) -> String {
    json.replace('<', "\\u003c")
}

/// Text as HTML shows it, in content and in quoted attributes.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            char => out.push(char),
        }
    }
    out
}

/// A source expression of the content security policy.
fn source_hash(text: &str) -> String {
    format!("sha256-{}", base64(&Sha256::digest(text.as_bytes())))
}

/// RFC 4648 section 4, with padding.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |index: usize| u32::from(chunk.get(index).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            // A chunk of n bytes has n + 1 digits.
            if place <= chunk.len() {
                let digit = (bits >> (18 - 6 * place)) & 63;
                text.push(char::from(ALPHABET[digit as usize]));
            } else {
                text.push('=');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_those_of_the_rfc() {
        // RFC 4648, section 10.
        for (text, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(text.as_bytes()), expected);
        }
        // printf '' | openssl dgst -sha256 -binary | base64
        assert_eq!(
            source_hash(""),
            "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="
        );
    }

    #[test]
    fn data_cannot_leave_its_element_and_reads_back() {
        let hostile = "</script><script>alert(1)</script><!-- <b>&amp; \u{2028}";
        let json = serde_json::to_string(hostile).expect("a string");
        let html = document(Kind::Run, hostile, &[("data", json)]);
        // Our own two scripts, the data, and nothing of the text's.
        assert_eq!(html.matches("<script").count(), 3);
        assert_eq!(html.matches("</script").count(), 3);
        assert!(!html.contains("<b>") && !html.contains("<!-- "));
        let start = html.find("id=\"data\">").expect("the block is there") + 10;
        let end = start + html[start..].find("</script>").expect("it ends");
        let back: String = serde_json::from_str(&html[start..end]).expect("it is JSON");
        assert_eq!(back, hostile);
    }

    #[test]
    fn a_page_asks_for_nothing_and_runs_only_what_its_policy_names() {
        for kind in [Kind::Run, Kind::Comparison] {
            let html = document(kind, "t", &[("data", "{}".to_owned())]);
            for loading in [
                " src=",
                " href=",
                "url(",
                "@import",
                "<link",
                "<img",
                "<iframe",
                "fetch(",
                "XMLHttpRequest",
                "WebSocket",
                "innerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "new Function",
            ] {
                assert!(!html.contains(loading), "{loading}");
            }
            assert!(html.contains("default-src 'none'"));
            let mut rest = html.as_str();
            let mut n_scripts = 0;
            while let Some(start) = rest.find("<script>") {
                let body = &rest[start + 8..];
                let end = body.find("</script>").expect("it ends");
                assert!(html.contains(&source_hash(&body[..end])));
                n_scripts += 1;
                rest = &body[end..];
            }
            assert_eq!(n_scripts, 2);
            assert!(!html.contains("unsafe-inline"));
        }
    }

    #[test]
    fn text_is_escaped_for_content_and_attributes() {
        assert_eq!(escape("<a b='\"&\">"), "&lt;a b=&#39;&quot;&amp;&quot;&gt;");
    }
}
