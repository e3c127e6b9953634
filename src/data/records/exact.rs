//! Numbers of JSON as they are written, where a double does not hold them: ids of more than 64 bits.

use std::collections::BTreeMap;

use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Map, Value};

/// The text of each field that is written back otherwise: `12345678901234567890123` as `1.2345678901234568e+22`.
/// `object` is the JSON that `fields` were parsed from.
pub(super) fn fields(object: &str, fields: &Map<String, Value>) -> BTreeMap<String, String> {
    if !fields.values().any(has_fraction) {
        return BTreeMap::new();
    }
    let differs = |key: &str, raw: &str| {
        fields.get(key).is_some_and(|value| has_fraction(value) && format!("{value}") != raw)
    };
    let members = members(object).into_iter().filter(|(key, raw)| differs(key, raw));
    // within strings JSON has no line ends, so these are spaces between values
    members.map(|(key, raw)| (key, raw.replace(['\r', '\n'], " "))).collect()
}

/// Whether a number stands in the value that was read as a double.
pub(super) fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(list) => list.iter().any(has_fraction),
        Value::Object(object) => object.values().any(has_fraction),
        _ => false,
    }
}

/// The members of a JSON object or array that was found to be one: keys (empty in an array) and the values' texts.
pub(super) fn members(json: &str) -> Vec<(String, &str)> {
    let json = json.trim_start();
    let is_object = json.starts_with('{');
    let mut rest = json.get(1..).unwrap_or_default();
    let mut members = Vec::new();
    loop {
        rest = rest.trim_start_matches([' ', '\t', '\r', '\n', ',']);
        let mut key = String::new();
        if is_object {
            let Some((name, _)) = first::<String>(&mut rest) else { break };
            key = name;
            rest = rest.trim_start().strip_prefix(':').unwrap_or_default();
        }
        let Some((_, raw)) = first::<IgnoredAny>(&mut rest) else { break };
        members.push((key, raw));
    }
    members
}

/// Takes the first value of a text, and tells how it is written.
fn first<'t, T: DeserializeOwned>(rest: &mut &'t str) -> Option<(T, &'t str)> {
    let mut values = serde_json::Deserializer::from_str(rest).into_iter::<T>();
    let value = values.next()?.ok()?;
    let (raw, behind) = rest.split_at(values.byte_offset());
    *rest = behind;
    Some((value, raw.trim()))
}
