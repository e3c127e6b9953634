//! JSON against a schema of an OpenAPI document, as far as tk's own document has schemas: what else one says is told.

use serde_json::Value;

/// Why a value does not fit a schema of the document, with the place in it.
///
/// # Errors
/// It does not fit.
pub fn check(document: &Value, schema: &Value, value: &Value, place: &str) -> Result<(), String> {
    let fail = |why: &str| Err(format!("{place}: {value} {why}"));
    for (keyword, says) in schema.as_object().ok_or("a schema is no object")? {
        match keyword.as_str() {
            "description" | "format" | "title" => {}
            "$ref" => {
                let referred = document.pointer(says.as_str().unwrap().trim_start_matches('#'));
                check(document, referred.ok_or(format!("there is no {says}"))?, value, place)?;
            }
            "type" => {
                let names = says.as_array().cloned().unwrap_or_else(|| vec![says.clone()]);
                let is = |name: &Value| match name.as_str().unwrap() {
                    "null" => value.is_null(),
                    "boolean" => value.is_boolean(),
                    "integer" => value.is_i64() || value.is_u64(),
                    "number" => value.is_number(),
                    "string" => value.is_string(),
                    "array" => value.is_array(),
                    "object" => value.is_object(),
                    other => panic!("the type {other}"),
                };
                if !names.iter().any(is) {
                    return fail(&format!("is no {says}"));
                }
            }
            "enum" if !says.as_array().unwrap().contains(value) => {
                return fail(&format!("is none of {says}"));
            }
            "minimum" if value.is_number() && value.as_f64() < says.as_f64() => {
                return fail(&format!("is below {says}"));
            }
            "maximum" if value.as_f64() > says.as_f64() => return fail(&format!("is above {says}")),
            "required" => {
                let lacks = |name: &&Value| value.get(name.as_str().unwrap()).is_none();
                if let Some(name) = says.as_array().unwrap().iter().find(lacks) {
                    return fail(&format!("has no {name}"));
                }
            }
            "properties" => {
                for (name, schema) in says.as_object().unwrap() {
                    if let Some(field) = value.get(name) {
                        check(document, schema, field, &format!("{place}.{name}"))?;
                    }
                }
            }
            "additionalProperties" if says == false => {
                let known = |name: &String| schema["properties"].get(name).is_some();
                if let Some(name) =
                    value.as_object().and_then(|fields| fields.keys().find(|name| !known(name)))
                {
                    return fail(&format!("has {name:?}, of which nothing is said"));
                }
            }
            "propertyNames" => {}
            "additionalProperties" => {
                for (name, field) in value.as_object().into_iter().flatten() {
                    if schema["properties"].get(name).is_none() {
                        check(document, says, field, &format!("{place}.{name}"))?;
                    }
                }
            }
            "items" => {
                for (i, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(document, says, item, &format!("{place}[{i}]"))?;
                }
            }
            "anyOf" | "oneOf" => {
                let tried: Vec<_> = (says.as_array().unwrap().iter())
                    .map(|schema| check(document, schema, value, place))
                    .collect();
                let fitting = tried.iter().filter(|tried| tried.is_ok()).count();
                if fitting == 0 || (fitting > 1 && keyword == "oneOf") {
                    return fail(&format!("fits {fitting} of the schemas: {tried:?}"));
                }
            }
            "enum" | "minimum" | "maximum" => {}
            other => return fail(&format!("is held against {other}, which this check does not know")),
        }
    }
    Ok(())
}
