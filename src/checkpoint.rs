//! Hugging Face checkpoints: a directory's safetensors → named f32 weights, and back.
//!
//! Names are made canonical here and nowhere else: the family's prefix is put where it lacks,
//! `gamma` and `beta` become `weight` and `bias`, buffers are dropped.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::Context;
use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};

use crate::model::ops::{Param, Part};
use crate::{Result, bail_unusable, unusable};

/// What lists the files that weights are spread over.
pub const INDEX: &str = "model.safetensors.index.json";

/// The weights of a model directory, mapped into memory.
pub struct Weights {
    files: Vec<(PathBuf, Mmap)>,
    entries: BTreeMap<String, Entry>,
}

struct Entry {
    file: usize,
    /// Byte range in the file.
    bytes: std::ops::Range<usize>,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// How a definition's parameters and a checkpoint's weights fit.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Fit {
    /// Parameters of the head that the checkpoint lacks: to be initialised.
    pub new: Vec<String>,
    /// Weights that the definition does not use.
    pub unused: Vec<String>,
}

impl Weights {
    /// Maps `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// No such file, or one that is truncated, corrupt, or of a dtype other than f32, f16, bf16 and f64.
    pub fn open(dir: &Path) -> Result<Self> {
        let mut weights = Self { files: Vec::new(), entries: BTreeMap::new() };
        for path in weight_files(dir)? {
            weights.map(&path)?;
        }
        weights.make_names_canonical();
        Ok(weights)
    }

    /// Maps one file, its names as they are.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut weights = Self { files: Vec::new(), entries: BTreeMap::new() };
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
            if is_buffer(&name) {
                continue;
            }
            if !matches!(info.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64) {
                bail_unusable!(
                    "{}: {name} is {:?}; tk reads F32, F16, BF16 and F64 weights",
                    path.display(),
                    info.dtype
                );
            }
            let entry = Entry {
                file: self.files.len(),
                bytes: data + info.data_offsets.0..data + info.data_offsets.1,
                dtype: info.dtype,
                shape: info.shape.clone(),
            };
            self.entries.insert(name, entry);
        }
        self.files.push((path.to_owned(), map));
        Ok(())
    }

    fn make_names_canonical(&mut self) {
        let prefixed = self.entries.keys().any(|name| BODIES.iter().any(|(body, _)| name.starts_with(body)));
        let entries = std::mem::take(&mut self.entries);
        self.entries =
            entries.into_iter().map(|(name, entry)| (canonical_name(&name, prefixed), entry)).collect();
    }

    /// The canonical names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The shape of a weight, if there is one of this name.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|entry| entry.shape.as_slice())
    }

    /// A weight's values as f32, borrowed from the file where they are stored so.
    pub fn f32(&self, name: &str) -> Result<Cow<'_, [f32]>> {
        let entry = self.entries.get(name).with_context(|| format!("the checkpoint has no {name}"))?;
        let bytes = &self.files[entry.file].1[entry.bytes.clone()];
        let view = TensorView::new(entry.dtype, entry.shape.clone(), bytes)?;
        Ok(as_f32(&view))
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
                (None, Part::Head) => fit.new.push(param.name.clone()),
                (None, Part::Body) => wrong.push(format!("{} is missing", param.name)),
                (Some(entry), _) if entry.shape != param.shape => wrong.push(format!(
                    "{} has shape {:?}, config.json asks for {:?}",
                    param.name, entry.shape, param.shape
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

fn hex(bytes: &[u8]) -> String {
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
    let tensors: Vec<_> = tensors.into_iter().collect();
    let bytes: Vec<Cow<[u8]>> = tensors.iter().map(|(_, _, values)| f32_bytes(values)).collect();
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| Ok((*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes)?)))
        .collect::<Result<Vec<_>>>()?;
    // transformers refuses a file without this entry
    let about = [("format".to_owned(), "pt".to_owned())].into();
    crate::files::write_through_rename(path, |temporary| {
        // the library's own temporary file is readable by its owner alone
        let permissions = File::create(temporary)?.metadata()?.permissions();
        safetensors::serialize_to_file(views, Some(about), temporary)?;
        Ok(std::fs::set_permissions(temporary, permissions)?)
    })
}

/// The files that [`Weights::open`] maps: `model.safetensors`, or the shards that the index lists.
///
/// # Errors
/// There are none, or the index can't be read.
pub fn weight_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    if single.is_file() {
        return Ok(vec![single]);
    }
    let index = dir.join(INDEX);
    if index.is_file() {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let text = std::fs::read_to_string(&index).with_context(|| index.display().to_string())?;
        let index: Index = serde_json::from_str(&text).map_err(|e| unusable!("{}: {e}", index.display()))?;
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

fn is_buffer(name: &str) -> bool {
    // the last two are GPT-2's causal masks
    ["embeddings.position_ids", "embeddings.token_type_ids", ".attn.bias", ".attn.masked_bias"]
        .iter()
        .any(|buffer| name.ends_with(buffer))
}

/// The prefix of a family's body, and what begins with it: a checkpoint of the bare body has no prefix.
const BODIES: [(&str, &[&str]); 2] =
    [("bert.", &["embeddings.", "encoder.", "pooler."]), ("transformer.", &["wte.", "wpe.", "h.", "ln_f."])];

fn canonical_name(name: &str, prefixed: bool) -> String {
    let name = match name.rsplit_once('.') {
        Some((module, "gamma")) => format!("{module}.weight"),
        Some((module, "beta")) => format!("{module}.bias"),
        _ => name.to_owned(),
    };
    let body = BODIES.iter().find(|(_, parts)| parts.iter().any(|part| name.starts_with(part)));
    match body {
        Some((body, _)) if !prefixed => format!("{body}{name}"),
        _ => name,
    }
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

    #[test]
    fn names_become_canonical() {
        for (stored, prefixed, canonical) in [
            ("embeddings.LayerNorm.gamma", false, "bert.embeddings.LayerNorm.weight"),
            ("bert.embeddings.LayerNorm.beta", true, "bert.embeddings.LayerNorm.bias"),
            ("classifier.weight", false, "classifier.weight"),
            ("encoder.layer.0.output.dense.weight", false, "bert.encoder.layer.0.output.dense.weight"),
            ("h.0.attn.c_attn.weight", false, "transformer.h.0.attn.c_attn.weight"),
            ("transformer.wte.weight", true, "transformer.wte.weight"),
            ("score.weight", false, "score.weight"),
        ] {
            assert_eq!(canonical_name(stored, prefixed), canonical);
        }
    }

    #[test]
    fn a_file_in_half_precision_reads_as_f32() {
        let dir = tempfile::tempdir().unwrap();
        let values: Vec<u8> =
            [1.5f32, -2.0].iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
        let view = TensorView::new(Dtype::F16, vec![2], &values).unwrap();
        safetensors::serialize_to_file([("x", view)], None, &dir.path().join("model.safetensors")).unwrap();
        assert_eq!(Weights::open(dir.path()).unwrap().f32("x").unwrap().as_ref(), [1.5, -2.0]);
    }

    #[test]
    fn what_was_written_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        write_safetensors(&file, [("a", &[2usize, 1][..], &[1.0f32, 2.0][..])]).unwrap();
        let weights = Weights::open(dir.path()).unwrap();
        assert_eq!(weights.shape("a"), Some(&[2, 1][..]));
        assert_eq!(weights.f32("a").unwrap().as_ref(), [1.0, 2.0]);
    }
}
