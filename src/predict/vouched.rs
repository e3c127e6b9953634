//! What an export wrote down of its files → whether they are still those. A disk, a copy or another program may have
//! changed them since, and ONNX Runtime would compute with whatever stands there.

use std::path::Path;

use serde_json::{Map, Value};

use crate::{Result, checkpoint, unusable};

/// The file beside the graphs that vouches for them.
pub const MANIFEST: &str = "manifest.json";

/// Under which names an entry of a manifest has a file and its hash.
const NAMES: [(&str, &str); 2] = [("file", "sha256"), ("data_file", "data_sha256")];

/// Holds a graph and the file with its weights against the manifest in their folder. Of what that doesn't speak, and
/// where there is none, nothing is said.
///
/// # Errors
/// Unusable: a file has another hash, or the manifest can't be read.
pub fn check(graph: &Path) -> Result<()> {
    let folder = graph.parent().unwrap_or(Path::new(""));
    let place = folder.join(MANIFEST);
    let mut bytes = read(&place)?;
    loop {
        let manifest: Map<String, Value> = serde_json::from_slice(bytes.as_deref().unwrap_or(b"{}"))
            .map_err(|e| unusable!("{}: {e}: delete it, and run `tk export` again", place.display()))?;
        let Some(error) = contradiction(&manifest, graph, folder, &place) else { return Ok(()) };
        let now = read(&place)?;
        if now == bytes {
            return Err(error);
        }
        bytes = now; // an export put others in place
    }
}

fn read(manifest: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(manifest) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        bytes => Ok(Some(bytes.map_err(|e| unusable!("{}: {e}", manifest.display()))?)),
    }
}

/// What is another file than a manifest says, of a graph and its weights.
fn contradiction(
    manifest: &Map<String, Value>,
    graph: &Path,
    folder: &Path,
    place: &Path,
) -> Option<anyhow::Error> {
    let entry = entry(manifest, &graph.file_name()?.to_string_lossy())?;
    NAMES.into_iter().find_map(|(name, hash)| {
        let (file, wanted) = (entry.get(name)?.as_str()?, entry.get(hash)?.as_str()?);
        let path = folder.join(file);
        match checkpoint::file_hash(&path) {
            Ok(found) if found == wanted => None,
            Ok(found) => Some(unusable!(
                "{} is not the file that `tk export` verified: its sha256 is {found}, {} says {wanted}. It was damaged, \
                 or changed since: run `tk export` again, or, if the change is yours, delete {MANIFEST}",
                path.display(),
                place.display()
            )),
            Err(e) => Some(unusable!("{e:#}: run `tk export` again")),
        }
    })
}

/// What a manifest says of a graph, wherever it speaks of it.
fn entry<'m>(manifest: &'m Map<String, Value>, file: &str) -> Option<&'m Map<String, Value>> {
    if manifest.get("file").and_then(Value::as_str) == Some(file) {
        return Some(manifest);
    }
    manifest.values().filter_map(Value::as_object).find_map(|inner| entry(inner, file))
}

/// Takes back what a manifest vouches for of files that are about to be replaced. Whether it did.
pub fn disown(manifest: &mut Map<String, Value>, files: &[String]) -> bool {
    let mut changed = false;
    for (name, hash) in NAMES {
        let is_one =
            manifest.get(name).and_then(Value::as_str).is_some_and(|file| files.iter().any(|f| f == file));
        changed |= is_one && manifest.shift_remove(hash).is_some();
    }
    for inner in manifest.values_mut().filter_map(Value::as_object_mut) {
        changed |= disown(inner, files);
    }
    changed
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn files_are_held_against_the_entry_that_speaks_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["model.onnx", "model.onnx_data", "other.onnx", "new.onnx"] {
            std::fs::write(path(name), name).unwrap();
        }
        let hash = |name: &str| checkpoint::file_hash(&path(name)).unwrap();
        let mut manifest = json!({
            "file": "model.onnx", "sha256": hash("model.onnx"),
            "data_file": "model.onnx_data", "data_sha256": hash("model.onnx_data"),
            "precisions": {"int8": {"file": "other.onnx", "sha256": hash("other.onnx")}},
        });
        let check = |name: &str| super::check(&path(name)).map_err(|e| e.to_string());
        check("model.onnx").unwrap(); // nobody vouches
        std::fs::write(path(MANIFEST), manifest.to_string()).unwrap();
        for name in ["model.onnx", "other.onnx", "new.onnx"] {
            check(name).unwrap();
        }
        std::fs::write(path("other.onnx"), "otheR.onnx").unwrap();
        let error = check("other.onnx").unwrap_err();
        assert!(error.contains("other.onnx is not the file") && error.contains("tk export"), "{error}");
        check("model.onnx").unwrap();
        std::fs::write(path("model.onnx_data"), "").unwrap();
        assert!(check("model.onnx").unwrap_err().contains("model.onnx_data is not the file"));

        let manifest = manifest.as_object_mut().unwrap();
        assert!(!disown(manifest, &["new.onnx".to_owned()]));
        assert!(disown(manifest, &["other.onnx".to_owned(), "model.onnx_data".to_owned()]));
        std::fs::write(path(MANIFEST), json!(manifest).to_string()).unwrap();
        check("model.onnx").unwrap();
        check("other.onnx").unwrap();
        std::fs::write(path(MANIFEST), "{").unwrap();
        assert!(check("model.onnx").unwrap_err().contains("delete it"));
    }
}
