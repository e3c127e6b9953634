//! A model → its file, with large weights beside it where protobuf's 2 GB would not hold them; and back.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use anyhow::Context;
use prost::Message;

use super::graph::CONSTANTS;
use super::proto::tensor_proto::DataLocation;
use super::proto::{ModelProto, StringStringEntryProto, TensorProto};
use crate::{Result, files, unusable};

/// Above this many bytes of initializers they go into a file of their own: protobuf stops at 2 GiB.
const LARGEST_SINGLE_FILE: usize = 1_900_000_000;

/// Tensors below this size stay in the model file: shapes and scalars, which readers want at hand.
const SMALLEST_EXTERNAL: usize = 1024;

/// Each external tensor starts at a multiple of this, so that it can be mapped into memory.
const ALIGNMENT: usize = 4096;

/// Writes `model` to `path`, and its weights to `path` + `_data` if they are too large for one file or
/// `external` asks for it. Returns whether there is such a file.
pub fn save(mut model: ModelProto, path: &Path, external: bool) -> Result<bool> {
    let total: usize = model.graph.iter().flat_map(|g| &g.initializer).map(|t| t.raw_data.len()).sum();
    let external = external || total > LARGEST_SINGLE_FILE;
    if external {
        let data = data_path(path);
        let location = data.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        files::write_through_rename(&data, |temporary| write_data(&mut model, temporary, &location))?;
    }
    files::write(path, model.encode_to_vec())?;
    Ok(external)
}

/// Writes `model` to `path` with the large weights of `other`, a model in the same folder whose weights stand in a file
/// of their own.
///
/// # Errors
/// A large weight is none of the other's.
pub fn save_sharing(mut model: ModelProto, path: &Path, other: &Path) -> Result<()> {
    let other = decode(other)?;
    let known: BTreeMap<&str, &TensorProto> =
        other.graph.iter().flat_map(|graph| &graph.initializer).map(|t| (t.name.as_str(), t)).collect();
    for tensor in model.graph.iter_mut().flat_map(|graph| &mut graph.initializer) {
        if tensor.raw_data.len() < SMALLEST_EXTERNAL || tensor.name.starts_with(CONSTANTS) {
            continue;
        }
        let shared = known.get(tensor.name.as_str());
        let shared = shared.filter(|shared| shared.dims == tensor.dims && !shared.external_data.is_empty());
        *tensor =
            (*shared.with_context(|| format!("{} is not among the shared weights", tensor.name))?).clone();
    }
    files::write(path, model.encode_to_vec())
}

/// Where the weights of the model at `path` stand if they are in a file of their own.
pub fn data_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("_data");
    name.into()
}

/// Moves the large initializers out of the model into a file.
fn write_data(model: &mut ModelProto, path: &Path, location: &str) -> Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut offset = 0;
    for tensor in model.graph.iter_mut().flat_map(|graph| &mut graph.initializer) {
        if tensor.raw_data.len() < SMALLEST_EXTERNAL {
            continue;
        }
        let start = usize::next_multiple_of(offset, ALIGNMENT);
        file.write_all(&vec![0; start - offset])?;
        let bytes = std::mem::take(&mut tensor.raw_data);
        file.write_all(&bytes)?;
        offset = start + bytes.len();
        tensor.data_location = DataLocation::External as i32;
        let entry = |key: &str, value: String| StringStringEntryProto { key: key.to_owned(), value };
        tensor.external_data = vec![
            entry("location", location.to_owned()),
            entry("offset", start.to_string()),
            entry("length", bytes.len().to_string()),
        ];
    }
    file.flush()?;
    Ok(())
}

/// The metadata of a model file.
///
/// # Errors
/// As [`load`].
pub fn metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    let entries = decode(path)?.metadata_props;
    Ok(entries.into_iter().map(|entry| (entry.key, entry.value)).collect())
}

fn decode(path: &Path) -> Result<ModelProto> {
    let bytes = std::fs::read(path).map_err(|e| unusable!("{}: {e}", path.display()))?;
    ModelProto::decode(bytes.as_slice())
        .map_err(|e| unusable!("{}: not a whole ONNX model ({e}): export it again", path.display()))
}

/// Reads a model, with weights that stand in another file.
///
/// # Errors
/// The file is missing, is no ONNX model, or points outside its data file.
pub fn load(path: &Path) -> Result<ModelProto> {
    let mut model = decode(path)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    for tensor in model.graph.iter_mut().flat_map(|graph| &mut graph.initializer) {
        if tensor.data_location == DataLocation::External as i32 {
            tensor.raw_data = read_external(tensor, folder)
                .map_err(|e| unusable!("{}: the weights of {}: {e:#}", path.display(), tensor.name))?;
            tensor.external_data.clear();
            tensor.data_location = DataLocation::Default as i32;
        }
    }
    Ok(model)
}

fn read_external(tensor: &TensorProto, folder: &Path) -> Result<Vec<u8>> {
    use std::io::{Read, Seek, SeekFrom};
    let entry = |key: &str| {
        let found = tensor.external_data.iter().find(|entry| entry.key == key);
        found.map(|entry| entry.value.as_str()).with_context(|| format!("external data without {key}"))
    };
    let location = entry("location")?;
    anyhow::ensure!(
        Path::new(location).components().all(|part| matches!(part, std::path::Component::Normal(_))),
        "the location {location} leaves the model's folder"
    );
    let (offset, length): (u64, usize) = (entry("offset")?.parse()?, entry("length")?.parse()?);
    let mut file = File::open(folder.join(location)).with_context(|| location.to_owned())?;
    let size = file.metadata()?.len();
    anyhow::ensure!(
        offset.checked_add(length as u64).is_some_and(|end| end <= size),
        "{location} has {size} bytes, {length} from {offset} are asked for"
    );
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = vec![0; length];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A folder of its own that is removed with everything in it when it is dropped, or when the user stops the
/// process.
pub struct Scratch(PathBuf);

/// The folders that Ctrl-C must not leave behind.
static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

impl Scratch {
    /// Makes an empty folder inside `parent`.
    pub fn new(parent: &Path) -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            let stop = || {
                folders().iter().for_each(|folder| remove_folder(folder));
                std::process::exit(130);
            };
            // where no handler can be set, Ctrl-C ends the process as it always does
            let _ = ctrlc::set_handler(stop);
        });
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!(".tk-{}-{n}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| path.display().to_string())?;
        folders().push(path.clone());
        Ok(Self(path))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        remove_folder(&self.0);
        folders().retain(|folder| *folder != self.0);
    }
}

fn folders() -> MutexGuard<'static, Vec<PathBuf>> {
    FOLDERS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remove_folder(path: &Path) {
    // what can't be removed does no harm; the error that led here matters more
    let _ = std::fs::remove_dir_all(path);
}
