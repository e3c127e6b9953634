//! What a directory of `sentence-transformers` says of its embeddings: read in its old and its new form, and written so
//! that all its versions read it.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Embedding;
use crate::data::tokens::settings;
use crate::model::ops::{Pick, Pooling};
use crate::{Result, bail_unusable, unusable};

/// The list of modules, by which a directory is known.
pub const MODULES: &str = "modules.json";
/// How tokens are pooled, as tk writes it.
pub const POOLING: &str = "1_Pooling/config.json";
/// The longest text, and whether texts are made lower-case.
pub const TRANSFORMER: &str = "sentence_bert_config.json";
/// Prompts.
pub const MODEL: &str = "config_sentence_transformers.json";

/// The file names that `sentence-transformers` has had for [`TRANSFORMER`].
const TRANSFORMER_NAMES: [&str; 7] = [
    TRANSFORMER,
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
];

/// How the tokens of a text become its embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PoolBy {
    /// The first token: BERT's `[CLS]`.
    Cls,
    /// The mean of all.
    Mean,
    /// The largest number of each channel.
    Max,
    /// The sum by the square root of their number.
    MeanSqrtLen,
    /// The mean, where the first counts once, the second twice, and so on.
    WeightedMean,
    /// The last token: of a causal model, what has seen all.
    LastToken,
}

/// A mode, the key that says so in the old form of `1_Pooling/config.json`, and its name in the new one.
const MODES: [(PoolBy, &str, &str); 6] = [
    (PoolBy::Cls, "pooling_mode_cls_token", "cls"),
    (PoolBy::Mean, "pooling_mode_mean_tokens", "mean"),
    (PoolBy::Max, "pooling_mode_max_tokens", "max"),
    (PoolBy::MeanSqrtLen, "pooling_mode_mean_sqrt_len_tokens", "mean_sqrt_len_tokens"),
    (PoolBy::WeightedMean, "pooling_mode_weightedmean_tokens", "weightedmean"),
    (PoolBy::LastToken, "pooling_mode_lasttoken", "lasttoken"),
];

impl PoolBy {
    /// The one token that is asked for, or how all of them are pooled.
    pub fn verb(self) -> Result<Pick, Pooling> {
        match self {
            Self::Cls => Ok(Pick::First),
            Self::LastToken => Ok(Pick::Last),
            Self::Mean => Err(Pooling::Mean),
            Self::Max => Err(Pooling::Max),
            Self::MeanSqrtLen => Err(Pooling::MeanSqrtLength),
            Self::WeightedMean => Err(Pooling::WeightedMean),
        }
    }
}

/// What stands in front of texts, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompts {
    pub texts: BTreeMap<String, String>,
    /// The one that is taken where nobody names one.
    pub default: Option<String>,
}

impl Prompts {
    /// The prompt of a name, or the default one; empty where there is neither.
    ///
    /// # Errors
    /// Unusable: there is no prompt of this name.
    pub fn named(&self, name: Option<&str>) -> Result<&str> {
        let Some(name) = name.or(self.default.as_deref()) else { return Ok("") };
        self.texts.get(name).map(String::as_str).ok_or_else(|| match self.texts.is_empty() {
            true => unusable!("there is no prompt \"{name}\": {MODEL} of the model names none"),
            false => {
                let known: Vec<&str> = self.texts.keys().map(String::as_str).collect();
                unusable!("there is no prompt \"{name}\"; {MODEL} has {}", known.join(", "))
            }
        })
    }
}

/// An entry of `modules.json`.
#[derive(Deserialize)]
struct Module {
    path: String,
    #[serde(rename = "type")]
    class: String,
}

/// What the files of a directory say.
///
/// # Errors
/// Unusable: a file that can't be read, a module that tk does not run, or a width that is not the model's; names it.
pub fn read(dir: &Path, channels: usize) -> Result<Embedding> {
    let place = dir.join(MODULES);
    let bad = |why: String| unusable!("{}: {why}", place.display());
    let text = std::fs::read(&place).map_err(|e| bad(e.to_string()))?;
    let modules: Vec<Module> = serde_json::from_slice(&text)
        .map_err(|e| bad(format!("expected a list of modules with \"path\" and \"type\": {e}")))?;
    let mut found = Embedding::new(channels);
    // `sentence_transformers.models.Pooling`, or wherever its versions have put it
    let class = |module: &Module| module.class.rsplit('.').next().unwrap_or_default().to_owned();
    let classes: Vec<String> = modules.iter().map(class).collect();
    match classes.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["Transformer", "Pooling"] => {}
        ["Transformer", "Pooling", "Normalize"] => found.normalized = true,
        _ => {
            return Err(bad(format!(
                "the modules are {}; tk runs Transformer, Pooling and, behind them, Normalize",
                classes.join(", ")
            )));
        }
    }
    if !modules[0].path.is_empty() && modules[0].path != "." {
        return Err(bad(format!(
            "the transformer stands in {:?}; tk reads one that stands beside this file: move its files here, and make \
             the path \"\"",
            modules[0].path
        )));
    }
    let folder = Path::new(&modules[1].path);
    if folder.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(bad(format!("the path {:?} leads out of the directory", modules[1].path)));
    }
    read_pooling(&dir.join(folder).join("config.json"), &mut found)?;
    if let Some(path) = TRANSFORMER_NAMES.iter().map(|name| dir.join(name)).find(|path| path.exists()) {
        read_transformer(&path, &mut found)?;
    }
    read_prompts(&dir.join(MODEL), &mut found)?;
    Ok(found)
}

/// A field that may be absent or null.
fn field<T: serde::de::DeserializeOwned>(
    path: &Path,
    all: &Map<String, Value>,
    key: &str,
) -> Result<Option<T>> {
    let Some(value) = all.get(key).filter(|value| !value.is_null()) else { return Ok(None) };
    serde_json::from_value(value.clone()).map(Some).map_err(|e| unusable!("{}: {key}: {e}", path.display()))
}

fn read_pooling(path: &Path, found: &mut Embedding) -> Result<()> {
    let all = settings(path)?; // an empty module where there is none: the mean
    let place = path.display();
    for key in ["embedding_dimension", "word_embedding_dimension"] {
        match field::<usize>(path, &all, key)? {
            Some(width) if width != found.channels => {
                bail_unusable!("{place}: {key} is {width}, and the model is {} wide", found.channels)
            }
            _ => {}
        }
    }
    let modes: Vec<PoolBy> = match all.get("pooling_mode") {
        None | Some(Value::Null) => {
            let mut modes = Vec::new();
            for (mode, key, _) in MODES {
                // of a file that does not say, the mean: sentence-transformers' default
                if field(path, &all, key)?.unwrap_or(mode == PoolBy::Mean) {
                    modes.push(mode);
                }
            }
            modes
        }
        Some(named) => {
            let names = match named {
                Value::Array(list) => list.clone(),
                other => vec![other.clone()],
            };
            let mode = |name: &Value| {
                let lower = name.as_str().map(str::to_lowercase);
                let known = MODES.iter().find(|(_, _, own)| lower.as_deref() == Some(*own));
                known.map(|(mode, ..)| *mode).ok_or_else(|| {
                    let known: Vec<&str> = MODES.iter().map(|(_, _, name)| *name).collect();
                    unusable!("{place}: pooling_mode is {named}, expected one of {}", known.join(", "))
                })
            };
            names.iter().map(mode).collect::<Result<_>>()?
        }
    };
    let [mode] = modes[..] else {
        bail_unusable!(
            "{place}: {} ways of pooling are asked for; tk takes one, and puts no several side by side",
            modes.len()
        )
    };
    found.pooling = mode;
    found.pools_prompts = field(path, &all, "include_prompt")?.unwrap_or(true);
    Ok(())
}

fn read_transformer(path: &Path, found: &mut Embedding) -> Result<()> {
    let all = settings(path)?;
    found.max_length = field(path, &all, "max_seq_length")?;
    found.lower_case = field(path, &all, "do_lower_case")?.unwrap_or(false);
    if let Some(length) = found.max_length.filter(|&length| length < crate::saved::SHORTEST) {
        bail_unusable!(
            "{}: max_seq_length is {length}, expected at least {}",
            path.display(),
            crate::saved::SHORTEST
        );
    }
    Ok(())
}

fn read_prompts(path: &Path, found: &mut Embedding) -> Result<()> {
    let all = settings(path)?;
    found.prompts.texts = field(path, &all, "prompts")?.unwrap_or_default();
    found.prompts.default = field(path, &all, "default_prompt_name")?;
    // a default whose text is not there is refused, by its name and the file's
    found.prompts.named(None).map_err(|error| error.context(path.display().to_string()))?;
    found.about = all;
    Ok(())
}

/// The files of a trained model.
///
/// # Errors
/// JSON can't be written.
pub fn write(model: &Embedding) -> Result<Vec<(&'static str, String)>> {
    let pretty = |value: &Value| Ok::<_, anyhow::Error>(serde_json::to_string_pretty(value)? + "\n");
    let module = |index: usize, path: &str, class: &str| {
        json!({
            "idx": index,
            "name": index.to_string(),
            "path": path,
            "type": format!("sentence_transformers.models.{class}"),
        })
    };
    let mut modules = vec![module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling")];
    if model.normalized {
        modules.push(module(2, "2_Normalize", "Normalize"));
    }
    // the old form, which the new versions read too
    let mut pooling = Map::from_iter([("word_embedding_dimension".to_owned(), json!(model.channels))]);
    pooling.extend(MODES.iter().map(|(mode, key, _)| ((*key).to_owned(), json!(*mode == model.pooling))));
    pooling.insert("include_prompt".to_owned(), json!(model.pools_prompts));
    let mut about = model.about.clone();
    about.insert("prompts".to_owned(), json!(model.prompts.texts));
    about.insert("default_prompt_name".to_owned(), json!(model.prompts.default));
    about.insert("similarity_fn_name".to_owned(), json!("cosine"));
    Ok(vec![
        (MODULES, pretty(&Value::Array(modules))?),
        (POOLING, pretty(&Value::Object(pooling))?),
        (
            TRANSFORMER,
            pretty(&json!({"max_seq_length": model.max_length, "do_lower_case": model.lower_case}))?,
        ),
        (MODEL, pretty(&Value::Object(about))?),
    ])
}
