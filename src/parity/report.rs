//! What parity found → a table for the terminal.

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

/// In a word.
pub(super) fn verdict(compared: &Compared) -> &'static str {
    if compared.pass { "same" } else { "DIFFERS" }
}

/// How far a record alone is from the same among others.
fn among_others(compared: &Compared) -> Option<String> {
    let apart = compared.batch_invariance?;
    Some(format!("a record alone and the same among others: {apart:.2e}"))
}

/// What both measure.
pub(super) fn metric(compared: &Compared) -> Option<String> {
    let Measure { name, expected, found } = compared.metric.as_ref()?;
    Some(format!("{name} {found:.4}, {expected:.4} by {}", compared.compared_with))
}

/// Where the two part.
pub(super) fn first_difference(compared: &Compared) -> Option<String> {
    let d = compared.first_difference.as_ref()?;
    let token = d.token.map(|token| format!(", token {token}")).unwrap_or_default();
    Some(format!(
        "first at {}: record {}{token}, channel {}: {} expected, {} found",
        d.tap, d.record, d.channel, d.expected, d.found
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parity::Runtime;
    use crate::runtime::Provider;

    #[test]
    fn a_difference_shows() {
        let c = Compared::new(Runtime::Ort(Provider::Cpu), Runtime::Eager, &[vec![1.0]], &[vec![2.0]], 1e-4)
            .unwrap();
        assert!(table(&[c]).contains("DIFFERS"));
    }
}
