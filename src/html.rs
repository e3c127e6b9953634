//! Pages that stand on their own: one file, no script, nothing from elsewhere, dark where the reader's system is.

/// What all pages look like. Colours are names, so that a drawing follows the reader's choice as well.
pub const STYLE: &str = "\
:root { color-scheme: light dark; --text: #1d2126; --soft: #5c6670; --line: #d8dde2; --back: #fff; --card: #f6f8fa;
  --good: #1a7f37; --bad: #c4232b; --first: #0b62c4; --second: #b35c00; }
@media screen and (prefers-color-scheme: dark) { :root { --text: #e6e9ec; --soft: #9aa4ae; --line: #3a424a;
  --back: #14181c; --card: #1d2329; --good: #4cc26a; --bad: #ff6b6b; --first: #6cb0ff; --second: #ffb057; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 0 auto; padding: 2em;
  max-width: 70em; }
h1 { font-size: 1.5em; overflow-wrap: anywhere; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; width: 100%; } .wide { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .35em .7em; text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.n { font-variant-numeric: tabular-nums; white-space: nowrap; }
.pass { color: var(--good); font-weight: 600; } .fail { color: var(--bad); font-weight: 600; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 1em; margin: 1em 0; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-family: system-ui, sans-serif; }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; } td.text { min-width: 12em; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1.5em; } dt { color: var(--soft); } dd { margin: 0;
  overflow-wrap: anywhere; }";

/// By which a page is known to be tk's.
pub const MARK: &str = "<meta name=\"generator\" content=\"tk\">";

/// A page from its title, styles of its own and what stands in its body, which is HTML.
pub fn page(title: &str, style: &str, body: &str) -> String {
    let title = escaped(title);
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
         content=\"width=device-width, initial-scale=1\">{MARK}<title>{title}</title>\n<style>\n{STYLE}\n{style}\n</style></head>\
         <body>\n{body}</body></html>\n"
    )
}

/// A text in HTML, in an element or in an attribute.
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            // which a page can't have
            '\0' => escaped.push(char::REPLACEMENT_CHARACTER),
            c => escaped.push(c),
        }
    }
    escaped
}

/// The beginning of a text, of so many characters, in HTML; what was cut is marked.
pub fn beginning(text: &str, most: usize) -> String {
    let more = text.chars().count().saturating_sub(most);
    if more == 0 {
        return escaped(text);
    }
    let shown: String = text.chars().take(most).collect();
    format!("{}… <small>({more} more characters)</small>", escaped(&shown))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_text_says_is_no_html() {
        assert_eq!(escaped("<a href=\"x\">'&\0"), "&lt;a href=&quot;x&quot;&gt;&#39;&amp;\u{fffd}");
        assert_eq!(beginning("é<b", 2), "é&lt;… <small>(1 more characters)</small>");
        assert_eq!(beginning("é<", 2), "é&lt;");
        assert!(page("</title><script>", "", "").contains("<title>&lt;/title&gt;&lt;script&gt;</title>"));
    }
}
