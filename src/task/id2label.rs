//! The labels of `config.json`, as transformers has them.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use crate::model::{Head, ModelConfig};
use crate::{Result, bail_unusable, unusable};

/// What transformers' names of labels that have none begin with.
const DEFAULT_NAME: &str = "LABEL_";

/// Labels for a message: a model may have thousands.
pub fn told(labels: &[String]) -> String {
    crate::say::listed(labels.iter().map(String::as_str), TOLD)
}

/// Labels that are listed.
const TOLD: usize = 20;

/// transformers' names of labels that have none.
pub fn default_names(n: usize) -> Vec<String> {
    (0..n).map(|id| format!("{DEFAULT_NAME}{id}")).collect()
}

/// Names as ids: by number where all are integers (or all are transformers' `LABEL_7`), else by text. One rule for
/// all of them, because numbers among texts have no order that holds for any three.
pub fn in_order(names: BTreeSet<String>) -> Vec<String> {
    let mut names: Vec<String> = names.into_iter().collect();
    let integer = |name: &str| name.parse::<i128>().ok();
    let default = |name: &str| name.strip_prefix(DEFAULT_NAME)?.parse::<i128>().ok();
    if names.iter().all(|name| integer(name).is_some()) {
        names.sort_by_key(|name| integer(name)); // is stable: 01 stands before 1
    } else if names.iter().all(|name| default(name).is_some()) {
        names.sort_by_key(|name| default(name));
    }
    names
}

/// Writes a head's class and its labels.
pub fn write(config: &mut ModelConfig, head: Head, labels: &[String]) {
    let id2label: Map<String, Value> =
        labels.iter().enumerate().map(|(id, name)| (id.to_string(), json!(name))).collect();
    let label2id: Map<String, Value> =
        labels.iter().enumerate().map(|(id, name)| (name.clone(), json!(id))).collect();
    let class = config.family.class(head);
    let raw = &mut config.raw;
    raw.insert("architectures".to_owned(), json!([class]));
    raw.insert("id2label".to_owned(), Value::Object(id2label));
    raw.insert("label2id".to_owned(), Value::Object(label2id));
    raw.remove("num_labels"); // transformers derives it from id2label
}

/// The labels that `id2label` names, by ascending id.
///
/// # Errors
/// Unusable: ids that are not 0 to n − 1, or two of one name.
pub fn read(config: &ModelConfig) -> Result<Option<Vec<String>>> {
    let map = match config.raw.get("id2label") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(map)) if !map.is_empty() => map,
        Some(other) => bail_unusable!("id2label is {other}, expected an object of ids with names"),
    };
    let mut labels: Vec<Option<&str>> = vec![None; map.len()];
    for (id, name) in map {
        let slot = id.parse().ok().and_then(|id: usize| labels.get_mut(id));
        match (slot, name.as_str()) {
            (Some(slot), Some(name)) => *slot = Some(name),
            _ => bail_unusable!(
                "id2label has \"{id}\": {name}; expected the ids 0 to {} with names",
                map.len() - 1
            ),
        }
    }
    let labels: Vec<&str> =
        labels.into_iter().collect::<Option<_>>().ok_or_else(|| unusable!("id2label repeats an id"))?;
    let mut ids = BTreeMap::new();
    for (id, name) in labels.iter().enumerate() {
        if let Some(first) = ids.insert(name, id) {
            bail_unusable!(
                "id2label names the ids {first} and {id} both {name:?}; give each a name of its own"
            );
        }
    }
    Ok(Some(labels.into_iter().map(str::to_owned).collect()))
}
