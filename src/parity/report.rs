//! What parity found → a table for the terminal, and one for the browser.

use std::fmt::Write;

use super::{Compared, Measure};

/// One line a runtime; what it differs in below it.
pub fn table(compared: &[Compared]) -> String {
    let mut text = String::new();
    // writing to a String can't fail
    let _ = writeln!(
        text,
        "{:<18}{:<10}{:>11}{:>11}{:>9}{:>9}  verdict",
        "runtime", "against", "max |Δ|", "max rel", "argmax", "records"
    );
    for c in compared {
        let _ = writeln!(
            text,
            "{:<18}{:<10}{:>11.2e}{:>11.2e}{:>8.1}%{:>9}  {}",
            c.name,
            c.compared_with,
            c.max_abs,
            c.max_rel,
            100.0 * c.argmax_agreement,
            c.records,
            verdict(c)
        );
        for line in [among_others(c), metric(c), first_difference(c)].into_iter().flatten() {
            let _ = writeln!(text, "  {line}");
        }
    }
    text.pop(); // the last line's end is the printer's
    text
}

/// A page that stands on its own.
pub fn html(title: &str, compared: &[Compared], lacking: &[(&str, String)]) -> String {
    let mut rows = String::new();
    for c in compared {
        let class = if c.pass { "pass" } else { "fail" };
        let _ = writeln!(
            rows,
            "<tr class=\"{class}\"><td>{}</td><td>{}</td><td>{:.2e}</td><td>{:.2e}</td><td>{:.1} %</td>\
             <td>{}</td><td>{:.0e}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            c.name,
            c.compared_with,
            c.max_abs,
            c.max_rel,
            100.0 * c.argmax_agreement,
            c.records,
            c.tolerance,
            verdict(c),
            c.batch_invariance.map(|apart| format!("{apart:.2e}")).unwrap_or_default(),
            metric(c).unwrap_or_default(),
            escaped(&first_difference(c).unwrap_or_default())
        );
    }
    let lacking: String =
        lacking.iter().map(|(name, why)| format!("<li>{name}: {}</li>\n", escaped(why))).collect();
    let lacking = if lacking.is_empty() {
        String::new()
    } else {
        format!("<h2>Not on this machine</h2>\n<ul>\n{lacking}</ul>\n")
    };
    format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>Parity of {title}</title>\n\
         <style>\nbody {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em; }}\n\
         table {{ border-collapse: collapse; }}\n\
         th, td {{ border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: left; }}\n\
         .fail td {{ background: #fdd; }}\n</style></head><body>\n<h1>Parity of {title}</h1>\n<table>\n\
         <tr><th>runtime</th><th>against</th><th>max |Δ|</th><th>max rel</th><th>argmax agrees</th>\
         <th>records</th><th>tolerance</th><th>verdict</th><th>alone, among others</th><th>metric</th>\
         <th>first difference</th></tr>\n\
         {rows}</table>\n{lacking}<p>tk {}</p>\n</body></html>\n",
        env!("CARGO_PKG_VERSION"),
        title = escaped(title),
    )
}

fn verdict(compared: &Compared) -> &'static str {
    if compared.pass { "same" } else { "DIFFERS" }
}

/// How far a record alone is from the same among others.
fn among_others(compared: &Compared) -> Option<String> {
    let apart = compared.batch_invariance?;
    Some(format!("a record alone and the same among others: {apart:.2e}"))
}

fn metric(compared: &Compared) -> Option<String> {
    let Measure { name, expected, found } = compared.metric.as_ref()?;
    Some(format!("{name} {found:.4}, {expected:.4} by {}", compared.compared_with))
}

fn first_difference(compared: &Compared) -> Option<String> {
    let d = compared.first_difference.as_ref()?;
    let token = d.token.map(|token| format!(", token {token}")).unwrap_or_default();
    Some(format!(
        "first at {}: record {}{token}, channel {}: {} expected, {} found",
        d.tap, d.record, d.channel, d.expected, d.found
    ))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parity::Runtime;
    use crate::runtime::Provider;

    #[test]
    fn a_difference_shows_in_both_and_the_page_is_escaped() {
        let c = Compared::new(Runtime::Ort(Provider::Cpu), Runtime::Eager, &[vec![1.0]], &[vec![2.0]], 1e-4)
            .unwrap();
        assert!(table(std::slice::from_ref(&c)).contains("DIFFERS"));
        let page = html("a<b", &[c], &[("ort-cuda", "no <GPU>".to_owned())]);
        assert!(page.contains("a&lt;b") && page.contains("no &lt;GPU&gt;") && page.contains("DIFFERS"));
    }
}
