//! Names of files as a file of settings has them: one as it is, several as a list.

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

#[derive(Deserialize)]
#[serde(untagged)]
enum Names {
    One(PathBuf),
    Several(Vec<PathBuf>),
}

/// Writes them.
///
/// # Errors
/// Those of the format.
pub fn serialize<S: Serializer>(names: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    match names {
        [name] => name.serialize(serializer),
        names => names.serialize(serializer),
    }
}

/// Reads them.
///
/// # Errors
/// It is neither.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PathBuf>, D::Error> {
    Ok(match Names::deserialize(deserializer)? {
        Names::One(name) => vec![name],
        Names::Several(names) => names,
    })
}
