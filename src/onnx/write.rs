//! A model → its file, with large weights beside it where protobuf's 2 GB would not hold them; and back.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, BufWriter, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use anyhow::Context;
use prost::Message;

use super::graph::CONSTANTS;
use super::proto::tensor_proto::DataLocation;
use super::proto::{ModelProto, StringStringEntryProto, TensorProto};
use crate::{Result, checkpoint, files, process, unusable};

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

/// The metadata of a model file. The graph is passed over: its weights are not read.
///
/// # Errors
/// Unusable: the file is missing, or is no ONNX model.
pub fn metadata(path: &Path) -> Result<BTreeMap<String, String>> {
    let entries = File::open(path).map_err(anyhow::Error::new).and_then(|file| metadata_of(&file));
    entries.map_err(|e| unusable!("{}: not a whole ONNX model ({e:#}): export it again", path.display()))
}

/// The field of `ModelProto` that has a model's metadata, and the most bytes of an entry.
const METADATA: u64 = 14;
const LARGEST_ENTRY: u64 = 1 << 24;

fn metadata_of(file: &File) -> Result<BTreeMap<String, String>> {
    let size = file.metadata()?.len();
    let mut file = BufReader::new(file);
    let mut entries = BTreeMap::new();
    while file.stream_position()? < size {
        // protobuf's wire format: the field's number and how it is written
        let key = varint(&mut file)?;
        let skipped = match key & 7 {
            0 => {
                varint(&mut file)?;
                0
            }
            1 => 8,
            5 => 4,
            2 => {
                let length = varint(&mut file)?;
                let left = size - file.stream_position()?;
                anyhow::ensure!(length <= left, "{length} bytes are due where {left} are left");
                if key >> 3 == METADATA {
                    anyhow::ensure!(length <= LARGEST_ENTRY, "an entry of {length} bytes");
                    let mut bytes = vec![0; length as usize];
                    file.read_exact(&mut bytes)?;
                    let entry = StringStringEntryProto::decode(&bytes[..])?;
                    entries.insert(entry.key, entry.value);
                    0
                } else {
                    length
                }
            }
            kind => anyhow::bail!("a field is written in an unknown way, {kind}"),
        };
        file.seek_relative(i64::try_from(skipped)?)?;
    }
    anyhow::ensure!(file.stream_position()? == size, "the last field is cut off");
    Ok(entries)
}

/// A number in as many bytes as it needs, seven bits each, the lowest first.
fn varint(file: &mut impl Read) -> Result<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let mut byte = [0];
        file.read_exact(&mut byte)?;
        value |= u64::from(byte[0] & 0x7f) << shift;
        if byte[0] & 0x80 == 0 {
            return Ok(value);
        }
    }
    anyhow::bail!("a number does not end")
}

/// The names of a model file's inputs.
///
/// # Errors
/// As [`load`].
pub fn inputs(path: &Path) -> Result<Vec<String>> {
    let inputs = decode(path)?.graph.into_iter().flat_map(|graph| graph.input);
    Ok(inputs.map(|input| input.name).collect())
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
    use std::io::SeekFrom;
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

/// Puts verified graphs in place: those of `files` in the folder `written`, which share one file of weights, or
/// have none with `external` false. The first one's name is the weights' name less `_data`. The two folders must be on
/// one file system, and no other process may be doing this: see [`files::lock`].
///
/// Wherever the process ends, each graph in `folder` is whole, an old one or a new one, and has the weights that it was
/// written with; so the weights come first under a name of their own, and the graphs that stand there in between name
/// that one.
pub fn install(written: &Path, folder: &Path, files: &[&str], external: bool) -> Result<()> {
    for step in steps(written, folder, files, external)? {
        step.take(folder)?;
    }
    Ok(())
}

/// One step of putting graphs in place; each is whole or not done.
enum InstallStep {
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    /// Waits until the disk has the names: what follows needs them.
    Sync,
}

impl InstallStep {
    fn take(&self, folder: &Path) -> Result<()> {
        let (done, path) = match self {
            Self::Rename(from, to) => (std::fs::rename(from, to), to.as_path()),
            Self::Remove(path) => (std::fs::remove_file(path), path.as_path()),
            Self::Sync => (files::sync_folder(folder), folder),
        };
        match done {
            Err(e) if e.kind() == ErrorKind::NotFound && matches!(self, Self::Remove(_)) => Ok(()),
            done => done.with_context(|| path.display().to_string()),
        }
    }
}

/// What [`install`] does, in its order, once everything that takes room on the disk is written.
fn steps(written: &Path, folder: &Path, files: &[&str], external: bool) -> Result<Vec<InstallStep>> {
    let first = files.first().context("no graph to put in place")?;
    let data = format!("{first}_data");
    let put = |from: &str, to: &str| InstallStep::Rename(written.join(from), folder.join(to));
    let mut steps = Vec::new();
    let mut meanwhile = None;
    if external {
        let name = format!("{data}.{}", &checkpoint::file_hash(&written.join(&data))?[..HASH_DIGITS]);
        for file in files {
            point_to(&written.join(file), &name, &written.join(format!("{file}{MEANWHILE}")))?;
        }
        let second = format!("{data}{MEANWHILE}");
        let (from, to) = (written.join(&data), written.join(&second));
        // a file system without hard links takes the room twice for a moment
        std::fs::hard_link(&from, &to)
            .or_else(|_| std::fs::copy(&from, &to).and_then(|_| File::open(&to)?.sync_all()))
            .with_context(|| to.display().to_string())?;
        steps.extend([put(&data, &name), InstallStep::Sync]);
        steps.extend(files.iter().map(|file| put(&format!("{file}{MEANWHILE}"), file)));
        steps.extend([InstallStep::Sync, put(&second, &data), InstallStep::Sync]);
        meanwhile = Some(name);
    }
    steps.extend(files.iter().map(|file| put(file, file)));
    steps.push(InstallStep::Sync);
    if !external {
        steps.push(InstallStep::Remove(folder.join(&data)));
    }
    // this one's, and those of exports that were killed
    let left = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let left = left.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let left: BTreeSet<String> = left.filter(|name| is_meanwhile(name, &data)).chain(meanwhile).collect();
    steps.extend(left.into_iter().map(|name| InstallStep::Remove(folder.join(name))));
    Ok(steps)
}

/// Behind the name of a file that stands in another's place for a moment.
const MEANWHILE: &str = ".meanwhile";

/// Digits of its hash in the name of a file of weights that stands there for a moment.
const HASH_DIGITS: usize = 16;

/// Whether a file name is that of weights which stood in for `data` for a moment.
fn is_meanwhile(name: &str, data: &str) -> bool {
    let hash = name.strip_prefix(data).and_then(|rest| rest.strip_prefix('.'));
    hash.is_some_and(|hash| hash.len() == HASH_DIGITS && hash.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// Writes the graph at `path` to `target`, with its weights in a file called `data`.
pub(crate) fn point_to(path: &Path, data: &str, target: &Path) -> Result<()> {
    let mut model = decode(path)?;
    let tensors = model.graph.iter_mut().flat_map(|graph| &mut graph.initializer);
    for entry in tensors.flat_map(|tensor| &mut tensor.external_data).filter(|entry| entry.key == "location")
    {
        data.clone_into(&mut entry.value);
    }
    files::write(target, model.encode_to_vec())
}

/// A folder of its own that is removed with everything in it when it is dropped, or when the user stops the
/// process.
pub struct Scratch(PathBuf);

/// The folders that Ctrl-C must not leave behind.
static FOLDERS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

impl Scratch {
    /// Makes an empty folder inside `parent`, with a name that no other process has.
    pub fn new(parent: &Path) -> Result<Self> {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            process::on_stop(|signal| {
                folders().iter().for_each(|folder| remove_folder(folder));
                std::process::exit(process::exit_code(signal));
            });
        });
        let mut list = folders(); // held, so that Ctrl-C finds the folder
        let path = tempfile::Builder::new().prefix(files::TEMPORARY).tempdir_in(parent)?.keep();
        list.push(path.clone());
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
    // another thread may still be writing into it; what can't be removed does no harm, the error that led here matters
    // more
    for _ in 0..100 {
        match std::fs::remove_dir_all(path) {
            Err(e) if e.kind() == ErrorKind::DirectoryNotEmpty => {}
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::onnx::proto::GraphProto;

    /// A graph with one large weight of this value, and one that only this file knows.
    fn graph(value: u8, own: &str) -> ModelProto {
        let large = TensorProto {
            name: "w".to_owned(),
            dims: vec![2048],
            data_type: 2,
            raw_data: vec![value; 2048],
            ..Default::default()
        };
        let graph = GraphProto { name: own.to_owned(), initializer: vec![large], ..Default::default() };
        ModelProto { graph: Some(graph), ..Default::default() }
    }

    /// Writes two graphs that share their weights into a folder, as an export does.
    fn written(dir: &Path, value: u8, external: bool) -> Vec<&'static str> {
        std::fs::create_dir_all(dir).unwrap();
        save(graph(value, "one"), &dir.join("model.onnx"), external).unwrap();
        if !external {
            return vec!["model.onnx"];
        }
        save_sharing(graph(value, "two"), &dir.join("generate.onnx"), &dir.join("model.onnx")).unwrap();
        vec!["model.onnx", "generate.onnx"]
    }

    fn value(path: &Path) -> u8 {
        let bytes = load(path).unwrap().graph.unwrap().initializer.remove(0).raw_data;
        assert!(bytes.iter().all(|&byte| byte == bytes[0]));
        bytes[0]
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn metadata_is_what_the_whole_model_says_and_a_cut_file_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.onnx");
        let entry =
            |key: &str, value: &str| StringStringEntryProto { key: key.to_owned(), value: value.to_owned() };
        let entries = vec![entry("task", "x"), entry("labels", &"é".repeat(300))];
        let model = ModelProto { metadata_props: entries, ir_version: 300, ..graph(7, "one") };
        let bytes = model.encode_to_vec();
        std::fs::write(&path, &bytes).unwrap();
        let found = metadata(&path).unwrap();
        assert_eq!((found["task"].as_str(), found["labels"].chars().count()), ("x", 300));
        let whole = ModelProto::decode(&bytes[..]).unwrap();
        assert_eq!(found.len(), whole.metadata_props.len());
        for length in 0..bytes.len() {
            std::fs::write(&path, &bytes[..length]).unwrap();
            // cut between two fields it is a model, of fewer entries
            let is_model = ModelProto::decode(&bytes[..length]).is_ok();
            assert_eq!(metadata(&path).is_ok(), is_model, "cut after {length} of {} bytes", bytes.len());
        }
        std::fs::write(&path, [0xff; 40]).unwrap();
        assert!(format!("{:#}", metadata(&path).unwrap_err()).contains("not a whole ONNX model"));
        assert!(metadata(&dir.path().join("absent")).is_err());
    }

    #[test]
    fn wherever_an_export_is_killed_every_graph_has_its_own_weights() {
        for (old, new) in [(true, true), (true, false), (false, true), (false, false)] {
            let mut killed_after = 0;
            loop {
                let dir = tempfile::tempdir().unwrap();
                let (folder, scratch) = (dir.path().join("onnx"), dir.path().join("scratch"));
                std::fs::create_dir(&folder).unwrap();
                let first = dir.path().join("first");
                let files = written(&first, 1, old);
                install(&first, &folder, &files, old).unwrap();

                let files = written(&scratch, 2, new);
                let steps = steps(&scratch, &folder, &files, new).unwrap();
                let (taken, left) = steps.split_at(killed_after);
                taken.iter().for_each(|step| step.take(&folder).unwrap());
                for name in ["model.onnx", "generate.onnx"].iter().filter(|name| folder.join(name).exists()) {
                    // the other graph of an old language model is none of the new one's
                    assert!(
                        old && !new && *name == "generate.onnx"
                            || [1, 2].contains(&value(&folder.join(name)))
                    );
                }
                let whole = left.is_empty();

                // and the next one ends well, whatever lies there
                let again = dir.path().join("again");
                let files = written(&again, 3, new);
                install(&again, &folder, &files, new).unwrap();
                for name in &files {
                    assert_eq!(value(&folder.join(name)), 3);
                }
                let stale = (old && !new).then_some("generate.onnx");
                let data = new.then_some("model.onnx_data");
                let mut wanted: Vec<&str> = files.iter().copied().chain(stale).chain(data).collect();
                wanted.sort_unstable();
                assert_eq!(names(&folder), wanted, "killed after {killed_after} steps");
                if whole {
                    break;
                }
                killed_after += 1;
            }
            assert!(killed_after >= 3);
        }
    }

    #[test]
    fn what_a_killed_process_left_does_not_hinder_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        let scratch: Vec<Scratch> = (0..3).map(|_| Scratch::new(dir.path()).unwrap()).collect();
        assert_eq!(names(dir.path()).len(), 3);
        // its number alone would be the name of a process that was killed: in a container they are the same
        let number = std::process::id().to_string();
        assert!(names(dir.path()).iter().all(|name| !name.ends_with(&number)));
        drop(scratch);
        assert!(names(dir.path()).is_empty());
    }
}
