//! Token ids that stand in configurations, held against the vocabulary.

use serde_json::{Map, Value};

use crate::{Result, bail_unusable};

/// The token that begins and ends GPT-2's texts: what `transformers` takes where a configuration names none.
pub const GPT2_END: u32 = 50_256;

/// A field's token ids: a number, or a list of them; `null` is an empty list. None where the field is absent.
///
/// # Errors
/// Unusable: something else, or a number that is no token of a vocabulary of so many.
pub fn read(fields: &Map<String, Value>, key: &str, vocab_size: usize) -> Result<Option<Vec<u32>>> {
    let Some(value) = fields.get(key) else { return Ok(None) };
    let values = match value {
        Value::Null => return Ok(Some(Vec::new())),
        Value::Array(values) => values.as_slice(),
        one => std::slice::from_ref(one),
    };
    let id = |value: &Value| u32::try_from(value.as_u64()?).ok().filter(|&id| (id as usize) < vocab_size);
    match values.iter().map(id).collect() {
        Some(ids) => Ok(Some(ids)),
        None => bail_unusable!(
            "{key} is {value}, and vocab_size is {vocab_size}: expected a token below it, a list of them, or null"
        ),
    }
}

/// Checks every field of a configuration that holds token ids, `…_token_id`.
///
/// # Errors
/// As [`read`].
pub fn check(fields: &Map<String, Value>, vocab_size: usize) -> Result<()> {
    fields
        .keys()
        .filter(|key| key.ends_with("_token_id"))
        .try_for_each(|key| read(fields, key, vocab_size).map(drop))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn token_ids_are_numbers_lists_and_null_below_the_size_of_the_vocabulary() {
        let of =
            |value: Value| read(json!({"eos_token_id": value}).as_object().unwrap(), "eos_token_id", 407);
        for (value, expected) in [
            (json!(406), vec![406]),
            (json!([406, 247]), vec![406, 247]),
            (json!([0]), vec![0]),
            (json!([]), vec![]),
            (json!(null), vec![]),
        ] {
            assert_eq!(of(value).unwrap(), Some(expected));
        }
        assert_eq!(read(&Map::new(), "eos_token_id", 407).unwrap(), None);
        for value in
            [json!(407), json!(-1), json!([406, 407]), json!("406"), json!(1.5), json!(u64::MAX), json!({})]
        {
            let said = of(value.clone()).unwrap_err().to_string();
            assert!(said.starts_with(&format!("eos_token_id is {value}, and vocab_size is 407")), "{said}");
        }
        let check = |fields: Value| check(fields.as_object().unwrap(), 407);
        check(json!({"bos_token_id": 0, "pad_token_id": null, "eos_token_id": [1], "vocab_size": 407}))
            .unwrap();
        for key in ["bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_eos_token_id"] {
            assert!(
                check(json!({key: 50256})).unwrap_err().to_string().starts_with(&format!("{key} is 50256"))
            );
        }
    }
}
