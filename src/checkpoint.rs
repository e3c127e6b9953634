//! Hugging Face checkpoints: a directory's safetensors → named f32 weights, and back.
//!
//! Names are made canonical here and nowhere else, by what the family says of them: its prefix is put where it
//! lacks, `gamma` and `beta` become `weight` and `bias`, buffers are dropped.

pub mod adapter;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};

use crate::model::family::Names;
use crate::model::ops::{Param, Part, Role};
use crate::{Result, bail_unusable, unusable};

/// What lists the files that weights are spread over.
pub const INDEX: &str = "model.safetensors.index.json";

/// The weights of a model directory, mapped into memory.
pub struct Weights {
    files: Vec<(PathBuf, Mmap)>,
    entries: BTreeMap<String, Entry>,
    /// What the files say of themselves.
    about: BTreeMap<String, String>,
}

struct Entry {
    values: Stored,
    dtype: Dtype,
    shape: Vec<usize>,
}

enum Stored {
    /// A range of a file's bytes.
    Mapped { file: usize, bytes: std::ops::Range<usize> },
    /// Computed of what files hold, in f32.
    Own(Vec<f32>),
}

/// The types that weights are read from. Others stand in checkpoints too, in buffers that no definition uses.
const READABLE: [Dtype; 4] = [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64];

/// How a definition's parameters and a checkpoint's weights fit.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Fit {
    /// Parameters of the head that the checkpoint lacks: to be initialised.
    pub new: Vec<String>,
    /// Weights that the definition does not use.
    pub unused: Vec<String>,
}

impl Weights {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` lists; of a folder with an adapter those
    /// of its base, into which it is merged.
    ///
    /// # Errors
    /// No such file, or one that is truncated or corrupt; as [`adapter::Adapter::merged`].
    pub fn open(dir: &Path, names: Names) -> Result<Self> {
        if adapter::is_in(dir) {
            return adapter::Adapter::open(dir, names)?.merged(names);
        }
        let mut weights = Self::none();
        for path in weight_files(dir)? {
            weights.map(&path)?;
        }
        let prefixed = weights.entries.keys().any(|name| name.starts_with(names.prefix));
        weights.entries.retain(|name, _| !names.buffers.iter().any(|buffer| name.ends_with(buffer)));
        weights.rename(|name| canonical_name(name, names, prefixed));
        Ok(weights)
    }

    fn none() -> Self {
        Self { files: Vec::new(), entries: BTreeMap::new(), about: BTreeMap::new() }
    }

    fn rename(&mut self, name: impl Fn(&str) -> String) {
        let entries = std::mem::take(&mut self.entries);
        self.entries = entries.into_iter().map(|(old, entry)| (name(&old), entry)).collect();
    }

    /// Puts a weight in place of the one of this name, if there is one.
    fn put(&mut self, name: &str, shape: Vec<usize>, values: Vec<f32>) {
        self.entries.insert(name.to_owned(), Entry { values: Stored::Own(values), dtype: Dtype::F32, shape });
    }

    /// Maps one file, its names as they are.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut weights = Self::none();
        weights.map(path)?;
        Ok(weights)
    }

    fn map(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(|e| unusable!("{}: {e}", path.display()))?;
        // SAFETY: the file is only read, and tk itself replaces weights by renaming, never in place. Another program
        // that writes into the file meanwhile can't be kept from it; every reader of mapped weights trusts in that.
        let map = unsafe { Mmap::map(&file) }.with_context(|| path.display().to_string())?;
        let broken = |e: &dyn std::fmt::Display| {
            unusable!(
                "{}: not a whole safetensors file ({e}); it has {} bytes: fetch or write it again",
                path.display(),
                map.len()
            )
        };
        SafeTensors::deserialize(&map).map_err(|e| broken(&e))?; // checks every offset against the file
        let (header_len, header) = SafeTensors::read_metadata(&map).map_err(|e| broken(&e))?;
        let data = 8 + header_len; // the file starts with the header's length as a u64
        for (name, info) in header.tensors() {
            let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
            let entry = Entry {
                values: Stored::Mapped { file: self.files.len(), bytes },
                dtype: info.dtype,
                shape: info.shape.clone(),
            };
            self.entries.insert(name, entry);
        }
        self.about
            .extend(header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
        self.files.push((path.to_owned(), map));
        Ok(())
    }

    /// The canonical names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The shape of a weight, if there is one of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// A weight's values as f32, borrowed where they are stored so.
    pub fn f32(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let entry = self.entries.get(name).with_context(|| format!("the checkpoint has no {name}"))?;
        match &entry.values {
            Stored::Own(values) => Ok(values.into()),
            Stored::Mapped { file, bytes } => {
                let bytes = &self.files[*file].1[bytes.clone()];
                Ok(as_f32(&TensorView::new(entry.dtype, entry.shape.clone(), bytes)?))
            }
        }
    }

    /// Holds the parameters of a definition against the weights.
    ///
    /// # Errors
    /// Lists every weight of the body that is missing and every shape that differs.
    pub fn fit(&self, params: &[Param]) -> Result<Fit> {
        let mut fit = Fit::default();
        let mut wrong = Vec::new();
        for param in params {
            match (self.entries.get(&param.name), param.part) {
                (None, Part::Head | Part::Labels | Part::Adapter) => fit.new.push(param.name.clone()),
                (None, Part::Body) => wrong.push(self.missing(param)),
                (Some(entry), _) if entry.shape != param.shape => wrong.push(format!(
                    "{} has shape {:?}, config.json asks for {:?}",
                    param.name, entry.shape, param.shape
                )),
                (Some(entry), _) if !READABLE.contains(&entry.dtype) => wrong.push(format!(
                    "{} is {:?}; tk reads F32, F16, BF16 and F64 weights",
                    param.name, entry.dtype
                )),
                (Some(_), _) => {}
            }
        }
        if !wrong.is_empty() {
            let file = self.files.first().map(|(path, _)| path.display().to_string()).unwrap_or_default();
            bail_unusable!(
                "{file} does not fit its config.json, {} of {} weights:\n  {}",
                wrong.len(),
                params.len(),
                shortened(&wrong, 12).join("\n  ")
            );
        }
        fit.unused =
            self.names().filter(|name| !params.iter().any(|p| p.name == **name)).map(str::to_owned).collect();
        Ok(fit)
    }

    /// Says that a weight is missing, and which other one may be it: of tied weights `safetensors.torch.save_model`
    /// keeps one, under the name that comes first in the alphabet.
    fn missing(&self, param: &Param) -> String {
        let head = self.entries.iter().find(|(name, entry)| {
            param.role == Role::Table && **name == "lm_head.weight" && entry.shape == param.shape
        });
        match head {
            Some((name, _)) => format!(
                "{} is missing, and {name} has its shape: if the two are tied, it was saved under that name alone; \
                 load the model in transformers, set the table from it, and save_pretrained() it",
                param.name
            ),
            None => format!("{} is missing", param.name),
        }
    }

    /// Drops a weight, so that [`Weights::fit`] takes its parameter for new. Returns whether it was there.
    pub fn forget(&mut self, name: &str) -> bool {
        self.entries.remove(name).is_some()
    }
}

/// Sha-256 over the names, shapes and f32 values of the given parameters, in their order, as hex.
pub fn weights_hash<'a>(weights: impl IntoIterator<Item = (&'a str, &'a [usize], &'a [f32])>) -> String {
    let mut hash = Sha256::new();
    for (name, shape, values) in weights {
        hash.update(name.as_bytes());
        hash.update([0]);
        for &n in shape {
            hash.update((n as u64).to_le_bytes());
        }
        hash.update(f32_bytes(values));
    }
    hex(&hash.finalize())
}

/// Sha-256 of a file as hex.
pub fn file_hash(path: &Path) -> Result<String> {
    let hashed = || -> std::io::Result<String> {
        let mut file = File::open(path)?;
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hex(&hash.finalize())),
                n => hash.update(&buffer[..n]),
            }
        }
    };
    hashed().with_context(|| path.display().to_string())
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of f32 values as checkpoints and ONNX files store them: little-endian, in order.
pub fn f32_bytes(values: &[f32]) -> Cow<'_, [u8]> {
    if cfg!(target_endian = "little") {
        // SAFETY: every bit pattern of an f32 is four valid bytes, and the length is in bytes.
        Cow::Borrowed(unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) })
    } else {
        Cow::Owned(values.iter().flat_map(|v| v.to_le_bytes()).collect())
    }
}

/// Writes named f32 tensors as a safetensors file that `transformers` reads, through a temporary name.
pub fn write_safetensors<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a [usize], &'a [f32])>,
) -> Result<()> {
    write_safetensors_about(path, tensors, &[])
}

/// The same with what the file says of itself.
fn write_safetensors_about<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a [usize], &'a [f32])>,
    about: &[(&str, &str)],
) -> Result<()> {
    let tensors: Vec<_> = tensors.into_iter().collect();
    let bytes: Vec<Cow<[u8]>> = tensors.iter().map(|(_, _, values)| f32_bytes(values)).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| Ok((*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    // transformers refuses a file without this entry
    let about = [("format", "pt")].iter().chain(about);
    let about = about.map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
    crate::files::write_through_rename(path, |temporary| {
        // the library's own temporary file is readable by its owner alone
        let permissions = File::create(temporary)?.metadata()?.permissions();
        safetensors::serialize_to_file(views, Some(about), temporary)?;
        Ok(std::fs::set_permissions(temporary, permissions)?)
    })
}

/// The files that [`Weights::open`] maps: `model.safetensors`, or the shards that the index lists; or an adapter's own.
///
/// # Errors
/// There are none, or the index can't be read.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    if adapter::is_in(dir) {
        return Ok(vec![dir.join(adapter::WEIGHTS)]);
    }
    let index_path = dir.join(INDEX);
    if index_path.is_file() {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let text = std::fs::read_to_string(&index_path).with_context(|| index_path.display().to_string())?;
        let index: Index =
            serde_json::from_str(&text).map_err(|e| unusable!("{}: {e}", index_path.display()))?;
        for name in index.weight_map.values() {
            if !is_file_name(name) {
                bail_unusable!("{}: {name:?} is not the name of a file beside it", index_path.display());
            }
        }
        let mut files: Vec<PathBuf> = index.weight_map.values().map(|file| dir.join(file)).collect();
        files.sort();
        files.dedup();
        return Ok(files);
    }
    let pickle = dir.join("pytorch_model.bin").is_file();
    bail_unusable!(
        "{} holds no model.safetensors{}",
        dir.display(),
        if pickle {
            "; its pytorch_model.bin can run code when it is read: load it in transformers and save_pretrained() it"
        } else {
            ""
        }
    )
}

/// Whether a name that stands in a file can be that of a file beside it, and of no other one.
pub fn is_file_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\'])
}

fn canonical_name(name: &str, names: Names, prefixed: bool) -> String {
    let name = match name.rsplit_once('.') {
        Some((module, "gamma")) => format!("{module}.weight"),
        Some((module, "beta")) => format!("{module}.bias"),
        _ => name.to_owned(),
    };
    if !prefixed && names.parts.iter().any(|part| name.starts_with(part)) {
        return format!("{}{name}", names.prefix);
    }
    name
}

fn as_f32<'a>(view: &TensorView<'a>) -> Cow<'a, [f32]> {
    let bytes = view.data();
    match view.dtype() {
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F64 => bytes.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b) as f32).collect(),
        _ => {
            // SAFETY: any four bytes are a valid f32; `align_to` leaves what is not aligned outside.
            let (before, values, after) = unsafe { bytes.align_to::<f32>() };
            if cfg!(target_endian = "little") && before.is_empty() && after.is_empty() {
                Cow::Borrowed(values)
            } else {
                bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
            }
        }
    }
}

fn shortened(lines: &[String], most: usize) -> Vec<String> {
    let mut shown: Vec<String> = lines.iter().take(most).cloned().collect();
    if lines.len() > most {
        shown.push(format!("and {} more", lines.len() - most));
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ops::At;

    const BERT: Names =
        Names { prefix: "bert.", parts: &["embeddings.", "encoder."], buffers: &["embeddings.position_ids"] };

    #[test]
    fn names_become_canonical() {
        for (stored, prefixed, canonical) in [
            ("embeddings.LayerNorm.gamma", false, "bert.embeddings.LayerNorm.weight"),
            ("bert.embeddings.LayerNorm.beta", true, "bert.embeddings.LayerNorm.bias"),
            ("classifier.weight", false, "classifier.weight"),
            ("encoder.layer.0.output.dense.weight", false, "bert.encoder.layer.0.output.dense.weight"),
            ("encoder.layer.0.output.dense.weight", true, "encoder.layer.0.output.dense.weight"),
        ] {
            assert_eq!(canonical_name(stored, BERT, prefixed), canonical);
        }
    }

    #[test]
    fn buffers_of_any_type_are_passed_over_and_a_weight_that_is_used_must_be_a_number() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = [0; 16];
        let view = |dtype, n: usize| TensorView::new(dtype, vec![n], &bytes).unwrap();
        let tensors = [
            ("bert.embeddings.position_ids", view(Dtype::I64, 2)),
            ("norm.num_batches_tracked", view(Dtype::I64, 2)),
            ("position_ids", view(Dtype::BOOL, 16)),
            ("x.weight", view(Dtype::I32, 4)),
        ];
        safetensors::serialize_to_file(tensors, None, &dir.path().join("model.safetensors")).unwrap();
        let weights = Weights::open(dir.path(), BERT).unwrap();
        let mut params = vec![At::head("y").table(2, 2).weight];
        assert_eq!(weights.fit(&params).unwrap().unused.len(), 3);
        params[0] = Param { name: "x.weight".to_owned(), shape: vec![4], ..params[0].clone() };
        let error = weights.fit(&params).unwrap_err().to_string();
        assert!(error.contains("x.weight is I32; tk reads F32"), "{error}");
    }

    #[test]
    fn a_table_that_was_saved_as_the_head_is_hinted_at() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        write_safetensors(&file, [("lm_head.weight", &[2usize, 1][..], &[1.0f32, 2.0][..])]).unwrap();
        let weights = Weights::open(dir.path(), BERT).unwrap();
        let error = weights.fit(&[At::body("transformer.wte").table(2, 1).weight]).unwrap_err().to_string();
        assert!(
            error.contains("transformer.wte.weight is missing, and lm_head.weight has its shape"),
            "{error}"
        );
        let error = weights.fit(&[At::body("transformer.wte").table(3, 1).weight]).unwrap_err().to_string();
        assert!(!error.contains("lm_head"), "{error}");
    }

    #[test]
    fn a_shard_stands_beside_its_index() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["../x.safetensors", "/x.safetensors", "a/b", "..", ""] {
            let index = serde_json::json!({"weight_map": {"x": name}}).to_string();
            std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
            let error = Weights::open(dir.path(), BERT).err().unwrap().to_string();
            assert!(error.contains("is not the name of a file beside it"), "{error}");
        }
    }

    #[test]
    fn a_file_in_half_precision_reads_as_f32() {
        let dir = tempfile::tempdir().unwrap();
        let values: Vec<u8> =
            [1.5f32, -2.0].iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
        let view = TensorView::new(Dtype::F16, vec![2], &values).unwrap();
        safetensors::serialize_to_file([("x", view)], None, &dir.path().join("model.safetensors")).unwrap();
        assert_eq!(Weights::open(dir.path(), BERT).unwrap().f32("x").unwrap().as_ref(), [1.5, -2.0]);
    }

    #[test]
    fn what_was_written_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        write_safetensors(&file, [("a", &[2usize, 1][..], &[1.0f32, 2.0][..])]).unwrap();
        let weights = Weights::open(dir.path(), BERT).unwrap();
        assert_eq!(weights.shape("a"), Some(&[2, 1][..]));
        assert_eq!(weights.f32("a").unwrap().as_ref(), [1.0, 2.0]);
    }
}
