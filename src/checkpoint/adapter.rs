//! PEFT's folders of adapters: low-rank matrices and a trained head, beside the name of the model that they adapt.
//!
//! Such a folder is opened as the model that it makes of its base: every adapted matrix is `W + scale · B · A`, computed
//! once in f32. What is computed apart from it, as in training, is [`Adapter::apart`].

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use rayon::prelude::*;
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Weights, canonical_name, file_hash, hex, weight_files};
use crate::data::hub;
use crate::model::family::Names;
use crate::model::lora::{Lora, LowRank, name_of_a, name_of_b};
use crate::{Result, bail_unusable, unusable};

/// What says that a folder holds an adapter.
pub const CONFIG: &str = "adapter_config.json";
/// Its matrices.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts in front of every name.
const PREFIX: &str = "base_model.model.";
/// The entry of the file's own metadata that says which weights the adapter was trained on.
const BASE_HASH: &str = "base_weights_sha256";

/// What of `adapter_config.json` changes what is computed; all else is PEFT's own business.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct PeftConfig {
    #[serde(default)]
    peft_type: Option<String>,
    pub base_model_name_or_path: Option<String>,
    #[serde(default)]
    pub revision: Option<String>,
    #[serde(default)]
    pub task_type: Option<String>,
    #[serde(default = "eight")]
    pub r: usize,
    #[serde(default = "eight_numbers")]
    pub lora_alpha: f64,
    #[serde(default)]
    pub lora_dropout: f64,
    #[serde(default)]
    pub target_modules: Value,
    #[serde(default)]
    pub modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    pub fan_in_fan_out: bool,
    #[serde(default)]
    pub use_rslora: bool,
    #[serde(default)]
    alpha_pattern: BTreeMap<String, f64>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

fn eight() -> usize {
    8
}

fn eight_numbers() -> f64 {
    8.0
}

/// Other settings of PEFT's that change nothing of what a trained adapter computes, whatever they are. Any other has to be
/// off.
const HARMLESS: [&str; 12] = [
    "auto_mapping",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "rank_pattern",
    "runtime_config",
];

/// Whether a setting is off: null, false, 0 or empty.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

impl PeftConfig {
    /// What `tk train` writes; `peft_task` is PEFT's name of the task.
    pub fn new(base: &str, revision: Option<&str>, peft_task: Option<&str>) -> Self {
        Self {
            peft_type: Some("LORA".to_owned()),
            base_model_name_or_path: Some(base.to_owned()),
            revision: revision.map(str::to_owned),
            task_type: peft_task.map(str::to_owned),
            others: [("bias", "none".into()), ("inference_mode", true.into()), ("use_dora", false.into())]
                .map(|(key, value): (&str, Value)| (key.to_owned(), value))
                .into_iter()
                .collect(),
            ..Self::default()
        }
    }

    fn read(path: &Path) -> Result<Self> {
        let place = || path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|e| unusable!("{}: {e}", place()))?;
        let config: Self =
            serde_json::from_str(&text).map_err(|e| unusable!("{}: no settings of PEFT's: {e}", place()))?;
        if config.peft_type.as_deref() != Some("LORA") {
            let found = config.peft_type.as_deref().unwrap_or("missing");
            bail_unusable!("{}: peft_type is {found}; tk runs LORA: merge the adapter in PEFT", place());
        }
        // some ways to begin change the base, too
        let plain_start = [Value::Bool(true), "gaussian".into(), "eva".into(), "orthogonal".into()];
        let is_plain = |key: &str, value: &Value| match key {
            "bias" => value == "none" || is_off(value),
            "init_lora_weights" => plain_start.contains(value) || is_off(value),
            key => HARMLESS.contains(&key) || is_off(value),
        };
        if let Some((key, value)) = config.others.iter().find(|(key, value)| !is_plain(key, value)) {
            bail_unusable!(
                "{}: {key} is {value}, which tk does not compute: merge the adapter in PEFT",
                place()
            );
        }
        if !config.lora_alpha.is_finite() {
            bail_unusable!("{}: lora_alpha is {}", place(), config.lora_alpha);
        }
        Ok(config)
    }

    /// `alpha` of a module: that of the first pattern that its name ends with, or all others'.
    fn alpha(&self, module: &str) -> Result<f64> {
        for (pattern, alpha) in &self.alpha_pattern {
            let regex = Regex::new(&format!(r"^(.*\.)?({pattern})$"))
                .map_err(|e| unusable!("alpha_pattern has {pattern:?}, which tk can't read: {e}"))?;
            if regex.is_match(module) {
                return Ok(*alpha);
            }
        }
        Ok(self.lora_alpha)
    }
}

/// An adapter that was read.
pub struct Adapter {
    dir: PathBuf,
    pub config: PeftConfig,
    /// The folder of the model that it adapts.
    pub base: PathBuf,
    /// Its own tensors, under their canonical names.
    own: Weights,
}

/// Whether a folder holds an adapter, and no whole model.
pub fn is_in(dir: &Path) -> bool {
    dir.join(CONFIG).is_file()
        && !dir.join("model.safetensors").is_file()
        && !dir.join(super::INDEX).is_file()
}

/// The folder of the model that a folder's adapter adapts; a folder without an adapter is its own.
///
/// # Errors
/// As [`Adapter::open`].
pub fn base_of(dir: &Path) -> Result<PathBuf> {
    match is_in(dir) {
        true => base(dir, &PeftConfig::read(&dir.join(CONFIG))?),
        false => Ok(dir.to_owned()),
    }
}

/// Finds the base: a folder, as it is named or beside the adapter's own, or a hub id.
fn base(dir: &Path, config: &PeftConfig) -> Result<PathBuf> {
    let place = || dir.join(CONFIG).display().to_string();
    let Some(name) = config.base_model_name_or_path.as_deref().filter(|name| !name.is_empty()) else {
        bail_unusable!("{}: base_model_name_or_path is missing, so nobody knows what is adapted", place());
    };
    let missing = |error: anyhow::Error| {
        unusable!(
            "{}: base_model_name_or_path is {name:?}, which can't be had ({error:#}): name its place now",
            place()
        )
    };
    let beside = dir.join(name);
    let base = match (Path::new(name).is_dir(), beside.is_dir()) {
        (true, _) => name.into(),
        (false, true) => beside,
        (false, false) => {
            let revision = config.revision.as_ref().map(|revision| format!("@{revision}"));
            hub::model_dir(&format!("{name}{}", revision.unwrap_or_default()), true).map_err(missing)?
        }
    };
    if is_in(&base) {
        bail_unusable!("{}: {name} is an adapter itself: merge it first", place());
    }
    Ok(base)
}

/// Sha-256 over the hashes of a model's files of weights.
///
/// # Errors
/// They can't be read.
pub fn base_hash(base: &Path) -> Result<String> {
    use sha2::Digest;
    let hashes = weight_files(base)?.iter().map(|path| file_hash(path)).collect::<Result<Vec<_>>>()?;
    Ok(hex(&sha2::Sha256::digest(hashes.concat())))
}

impl Adapter {
    /// Reads a folder's adapter and finds its base.
    ///
    /// # Errors
    /// Unusable: settings or tensors that tk does not know; a base that is not there, or has other weights than those
    /// that the adapter was trained on.
    pub fn open(dir: &Path, names: Names) -> Result<Self> {
        let config = PeftConfig::read(&dir.join(CONFIG))?;
        let base = base(dir, &config)?;
        let path = dir.join(WEIGHTS);
        if !path.is_file() && dir.join("adapter_model.bin").is_file() {
            bail_unusable!(
                "{} holds no {WEIGHTS}; its adapter_model.bin can run code when it is read: load it in PEFT and \
                 save_pretrained() it",
                dir.display()
            );
        }
        let mut own = Weights::open_file(&path)?;
        if let Some(trained_on) = own.about.get(BASE_HASH) {
            let found = base_hash(&base)?;
            if *trained_on != found {
                bail_unusable!(
                    "{}: {} has other weights than those that the adapter was trained on (sha256 {}…, expected {}…)",
                    dir.display(),
                    base.display(),
                    &found[..12],
                    trained_on.chars().take(12).collect::<String>()
                );
            }
        }
        let odd = own.names().find(|name| {
            !name.starts_with(PREFIX)
                || name.contains("lora_embedding_")
                || name.contains("lora_magnitude_vector")
        });
        if let Some(name) = odd {
            bail_unusable!("{}: {name} is no tensor of an adapter that tk computes", path.display());
        }
        own.rename(|name| name.strip_prefix(PREFIX).unwrap_or(name).to_owned());
        let prefixed = own.names().any(|name| name.starts_with(names.prefix));
        own.rename(|name| canonical_name(name, names, prefixed));
        Ok(Self { dir: dir.to_owned(), config, base, own })
    }

    /// The modules that it adapts, with their matrices' shapes checked against each other.
    pub fn lora(&self) -> Result<Lora> {
        let place = || self.dir.join(WEIGHTS).display().to_string();
        let mut maps = BTreeMap::new();
        for name in self.own.names() {
            let Some(module) = name.strip_suffix(".lora_A.weight") else {
                if name.ends_with(".lora_B.weight") && !self.has(&name.replace(".lora_B.", ".lora_A.")) {
                    bail_unusable!("{}: {name} stands there without its lora_A", place());
                }
                continue;
            };
            let shape = |name: &str| self.own.shape(name).unwrap_or_default().to_vec();
            let (a, b) = (shape(name), shape(&name_of_b(module)));
            let (&[rank, _], &[_, also]) = (&a[..], &b[..]) else {
                bail_unusable!("{}: {module} has matrices of the shapes {a:?} and {b:?}", place());
            };
            if rank != also || rank == 0 {
                bail_unusable!("{}: {module} has matrices of the ranks {rank} and {also}", place());
            }
            let alpha = self.config.alpha(module)?;
            maps.insert(module.to_owned(), LowRank::new(rank, alpha, self.config.use_rslora));
        }
        Ok(Lora { maps, dropout: self.config.lora_dropout as f32 })
    }

    fn has(&self, name: &str) -> bool {
        self.own.shape(name).is_some()
    }

    /// Its tensors that are no low-rank matrices: the trained head.
    pub fn head(&self) -> impl Iterator<Item = &str> {
        self.own.names().filter(|name| !name.contains(".lora_A.") && !name.contains(".lora_B."))
    }

    /// The rows of the head's last matrix, which are labels: none has fewer.
    pub fn rows(&self) -> Option<usize> {
        let shapes = self.head().filter_map(|name| self.own.shape(name));
        shapes.filter(|shape| shape.len() == 2).map(|shape| shape[0]).min()
    }

    /// The base's weights with the trained head's, and the low-rank matrices beside them under names of their own.
    ///
    /// # Errors
    /// The base's weights can't be read.
    pub fn apart(&self, names: Names) -> Result<Weights> {
        let mut weights = Weights::open(&self.base, names)?;
        for name in self.own.names() {
            weights.put(name, self.shape(name), self.own.f32(name)?.into_owned());
        }
        Ok(weights)
    }

    /// The base's weights with the trained head's, and the low-rank maps added to what they stand beside.
    ///
    /// # Errors
    /// Unusable: the base's weights can't be read, or a matrix does not fit the one that it stands beside.
    pub fn merged(&self, names: Names) -> Result<Weights> {
        let mut weights = Weights::open(&self.base, names)?;
        for name in self.head() {
            weights.put(name, self.shape(name), self.own.f32(name)?.into_owned());
        }
        let lora = self.lora()?;
        let merged: Vec<(String, Vec<usize>, Vec<f32>)> = lora
            .maps
            .par_iter()
            .map(|(module, low_rank)| {
                let name = format!("{module}.weight");
                let (a, b) = (self.own.f32(&name_of_a(module))?, self.own.f32(&name_of_b(module))?);
                let (input, output) = (a.len() / low_rank.rank, b.len() / low_rank.rank);
                let wanted = if self.config.fan_in_fan_out { [input, output] } else { [output, input] };
                let found = weights.shape(&name).map(<[usize]>::to_vec);
                if found.as_deref() != Some(&wanted[..]) {
                    let found =
                        found.map_or("no such weight".to_owned(), |shape| format!("the shape {shape:?}"));
                    bail_unusable!(
                        "{}: {module} adapts a matrix of the shape {wanted:?}; {} has {found}",
                        self.dir.join(WEIGHTS).display(),
                        self.base.display()
                    );
                }
                let mut values = weights.f32(&name)?.into_owned();
                add_product(&mut values, &a, &b, *low_rank, self.config.fan_in_fan_out);
                Ok((name, wanted.to_vec(), values))
            })
            .collect::<Result<_>>()?;
        merged.into_iter().for_each(|(name, shape, values)| weights.put(&name, shape, values));
        Ok(weights)
    }

    fn shape(&self, name: &str) -> Vec<usize> {
        self.own.shape(name).unwrap_or_default().to_vec()
    }
}

/// `W += scale · B · A`, where W is (out, in), or (in, out) where it is stored transposed.
fn add_product(w: &mut [f32], a: &[f32], b: &[f32], low_rank: LowRank, transposed: bool) {
    let LowRank { rank, scale } = low_rank;
    let (input, output) = (a.len() / rank, b.len() / rank);
    if w.is_empty() {
        return;
    }
    // a row of W is a sum of rows of the one matrix, with the other's numbers as factors
    let width = if transposed { output } else { input };
    w.par_chunks_mut(width).enumerate().for_each(|(row, w)| {
        for k in 0..rank {
            match transposed {
                false => {
                    let factor = (scale * f64::from(b[row * rank + k])) as f32;
                    w.iter_mut().zip(&a[k * input..]).for_each(|(w, a)| *w += factor * a);
                }
                true => {
                    let factor = (scale * f64::from(a[k * input + row])) as f32;
                    w.iter_mut().enumerate().for_each(|(o, w)| *w += factor * b[o * rank + k]);
                }
            }
        }
    });
}

/// Writes tensors, by their canonical names, as PEFT names them; `strip` is what the base's names lack.
///
/// # Errors
/// The file can't be written.
pub fn write_weights<'a>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'a str, &'a [usize], &'a [f32])>,
    strip: &str,
    base_hash: &str,
) -> Result<()> {
    let named: Vec<(String, &[usize], &[f32])> = tensors
        .into_iter()
        .map(|(name, shape, values)| {
            (format!("{PREFIX}{}", name.strip_prefix(strip).unwrap_or(name)), shape, values)
        })
        .collect();
    super::write_safetensors_about(
        path,
        named.iter().map(|(name, shape, values)| (name.as_str(), *shape, *values)),
        &[(BASE_HASH, base_hash)],
    )
}

/// The text of `adapter_config.json`.
///
/// # Errors
/// None that can be met: the settings are plain data.
pub fn config_text(config: &PeftConfig) -> Result<String> {
    Ok(serde_json::to_string_pretty(config).context(CONFIG)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_is_added_to_a_matrix_however_it_is_stored() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 10.0, 2.0, 20.0]); // (2, 3) and (2, 2)
        let low_rank = LowRank { rank: 2, scale: 0.5 };
        let mut w = [0.0; 6];
        add_product(&mut w, &a, &b, low_rank, false);
        assert_eq!(w, [20.5, 26.0, 31.5, 41.0, 52.0, 63.0]);
        let mut transposed = [0.0; 6];
        add_product(&mut transposed, &a, &b, low_rank, true);
        assert_eq!(transposed, [20.5, 41.0, 26.0, 52.0, 31.5, 63.0]);
    }
}
