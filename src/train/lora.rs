//! `--lora-rank`: a model → which of its maps are adapted, and what of it is written for PEFT.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::prepare::Prepared;
use crate::checkpoint::adapter::{self, PeftConfig};
use crate::eager::Trainable;
use crate::model::lora::{Lora, LowRank, module};
use crate::model::manifest::maps;
use crate::model::ops::{Layout, Linear, Part, Role};
use crate::model::{Family, Head};
use crate::{Result, bail_unusable, files, unusable};

/// Every linear map of the body.
const ALL: &str = "all-linear";

/// How many names an error lists.
const LISTED: usize = 12;

/// The largest rank: a map's own is no larger.
const MOST: usize = 4096;

/// Low-rank adaptation. Names and formulas are PEFT's.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct LoraFlags {
    /// Train low-rank maps beside the model's own, and the head, instead of the whole model. --output then holds PEFT's
    /// adapter, which tk and PEFT read.
    #[arg(long, value_name = "N", help_heading = "LoRA")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_rank: Option<usize>,
    /// What the low-rank maps count: alpha / rank times [default: twice the rank].
    #[arg(long, value_name = "X", requires = "lora_rank", help_heading = "LoRA")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    /// The probability with which what goes into them is dropped [default: 0].
    #[arg(long, value_name = "P", requires = "lora_rank", help_heading = "LoRA")]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora_dropout: Option<f32>,
    /// The modules that they stand beside: what their names end with (`query,value`), a regular expression of the whole
    /// name (`.*layer\.[6-9]\..*dense`), or all-linear [default: PEFT's choice for the family].
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "lora_rank", help_heading = "LoRA")]
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lora_targets: Vec<String>,
    /// Scale by alpha / √rank, for large ranks.
    #[arg(long, requires = "lora_rank", help_heading = "LoRA")]
    #[serde(default)]
    pub rslora: bool,
}

impl LoraFlags {
    /// All that is wrong with them.
    pub fn wrong(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        if let Some(rank) = self.lora_rank.filter(|rank| !(1..=MOST).contains(rank)) {
            wrong.push(format!("--lora-rank is {rank}, expected 1 to {MOST}"));
        }
        if let Some(alpha) = self.lora_alpha.filter(|alpha| !(*alpha > 0.0 && alpha.is_finite())) {
            wrong.push(format!("--lora-alpha is {alpha}, expected more than 0"));
        }
        if let Some(p) = self.lora_dropout.filter(|p| !(0.0..1.0).contains(p)) {
            wrong.push(format!("--lora-dropout is {p}, expected at least 0 and less than 1"));
        }
        wrong
    }

    fn alpha(&self, rank: usize) -> f64 {
        self.lora_alpha.unwrap_or(2.0 * rank as f64)
    }

    /// What stands beside a model's maps, where it is asked for.
    ///
    /// # Errors
    /// Unusable: a name that no map of the model has; the family lacks the head.
    pub fn chosen(&self, family: &Family, head: Head) -> Result<Option<Lora>> {
        let Some(rank) = self.lora_rank else { return Ok(None) };
        let maps = maps_of(family, head)?;
        let low_rank = LowRank::new(rank, self.alpha(rank), self.rslora);
        let mut chosen = BTreeMap::new();
        for target in self.targets(family) {
            let means = Target::read(&target)?;
            let names = maps.iter().filter(|map| map.weight.part == Part::Body).map(name_of);
            let before = chosen.len();
            chosen.extend(names.filter(|name| means.means(name)).map(|name| (name.to_owned(), low_rank)));
            if chosen.len() == before {
                let last = |map: &Linear| name_of(map).rsplit('.').next().unwrap_or_default().to_owned();
                let known: BTreeSet<String> = maps.iter().map(last).collect();
                bail_unusable!(
                    "--lora-targets {target:?} is no linear map of this model that isn't named yet; their names end with {}",
                    crate::say::listed(known.iter().map(String::as_str), LISTED)
                );
            }
        }
        Ok(Some(Lora { maps: chosen, dropout: self.lora_dropout.unwrap_or(0.0) }))
    }

    fn targets(&self, family: &Family) -> Vec<String> {
        match self.lora_targets.is_empty() {
            true => family.lora_targets().iter().map(|&name| name.to_owned()).collect(),
            false => self.lora_targets.clone(),
        }
    }
}

/// The linear maps of a model. Those of the body may be adapted; the head is trained as it is.
fn maps_of(family: &Family, head: Head) -> Result<Vec<Linear>> {
    let mut maps = maps(|o| family.clone().adapted(None).define(o, head).map(drop))?;
    maps.retain(|map| map.weight.role == Role::Matrix);
    Ok(maps)
}

fn name_of(map: &Linear) -> &str {
    module(&map.weight.name)
}

/// Whether a parameter stands in a module that PEFT always trains as it is.
pub fn is_head(name: &str, head: Head) -> bool {
    let modules = name.match_indices('.').map(|(end, _)| &name[..end]);
    modules.into_iter().any(|module| head.peft_modules().iter().any(|end| module.ends_with(end)))
}

/// What `--lora-targets` names, by PEFT's rules.
enum Target {
    All,
    /// What the names of modules end with, in whole parts.
    Ends(String),
    /// An expression of whole names.
    Whole(Regex),
}

impl Target {
    fn read(text: &str) -> Result<Self> {
        if text == ALL {
            return Ok(Self::All);
        }
        if !text.contains(['*', '+', '?', '[', ']', '(', ')', '{', '}', '|', '^', '$', '\\']) {
            return Ok(Self::Ends(text.to_owned()));
        }
        let regex = Regex::new(&format!("^(?:{text})$"));
        Ok(Self::Whole(
            regex.map_err(|e| unusable!("--lora-targets {text:?} is no regular expression: {e}"))?,
        ))
    }

    fn means(&self, name: &str) -> bool {
        match self {
            Self::All => true,
            Self::Ends(text) => {
                name.strip_suffix(text.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
            Self::Whole(regex) => regex.is_match(name),
        }
    }
}

/// Writes the adapter's files; its settings first, and then its weights, which make the folder whole.
///
/// # Errors
/// A file can't be written.
pub fn write(output: &Path, prepared: &Prepared, flags: &LoraFlags) -> Result<()> {
    let Prepared { config, learning, params, .. } = prepared;
    let (family, head) = (&config.family, learning.task.head());
    let Some((lora, rank)) = family.lora().zip(flags.lora_rank) else { anyhow::bail!("nothing is adapted") };
    let strip = match head {
        Head::Embedding { .. } => family.names().prefix, // PEFT's model has no head, and so no name in front
        _ => "",
    };
    let bare = |name: &str| name.strip_prefix(strip).unwrap_or(name).to_owned();
    let mut modules: Vec<String> = params
        .trainable()
        .filter(|own| own.param.part != Part::Adapter && !is_head(&own.param.name, head))
        .filter_map(|own| Some(bare(own.param.name.rsplit_once('.')?.0)))
        .collect();
    modules.dedup();
    modules.splice(0..0, head.peft_modules().iter().map(|&name| name.to_owned()));
    let maps = maps_of(family, head)?;
    let targets = flags.targets(family);
    let read = targets.iter().map(|target| Target::read(target)).collect::<Result<Vec<_>>>()?;
    // PEFT looks for them in the head, too
    let meant = maps.iter().map(name_of).filter(|name| read.iter().any(|target| target.means(name)));
    let as_asked = read.iter().all(|target| matches!(target, Target::Ends(_)))
        && meant.eq(maps.iter().map(name_of).filter(|name| lora.maps.contains_key(*name)));
    let targets = if as_asked { targets } else { lora.maps.keys().map(|name| bare(name)).collect() };
    let (base, revision) = prepared.base()?;
    let mut peft = PeftConfig::new(&base, revision.as_deref(), head.peft_task());
    peft.r = rank;
    peft.lora_alpha = flags.alpha(rank);
    peft.lora_dropout = f64::from(lora.dropout);
    peft.target_modules = json!(targets);
    peft.modules_to_save = (!modules.is_empty()).then_some(modules);
    let mut adapted = maps.iter().filter(|map| lora.maps.contains_key(name_of(map)));
    peft.fan_in_fan_out = adapted.any(|map| map.layout == Layout::InOut);
    peft.use_rslora = flags.rslora;
    files::write(&output.join(adapter::CONFIG), adapter::config_text(&peft)?)?;
    let values = params.values()?;
    let tensors = params.trainable().zip(&values);
    let tensors =
        tensors.map(|(Trainable { param, .. }, values)| (param.name.as_str(), &param.shape[..], &values[..]));
    adapter::write_weights(
        &output.join(adapter::WEIGHTS),
        tensors,
        strip,
        &adapter::base_hash(&prepared.model)?,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_ends_of_names_or_expressions_of_whole_ones() {
        let is = |target: &str, name: &str| Target::read(target).unwrap().means(name);
        assert!(
            is("query", "bert.layer.0.query") && is("self.query", "a.self.query") && is("query", "query")
        );
        assert!(!is("query", "bert.subquery") && !is("query", "query.x"));
        assert!(
            is(r".*\.[01]\.query", "bert.layer.1.query") && !is(r".*\.[01]\.query", "bert.layer.1.query.x")
        );
        assert!(is(ALL, "anything") && Target::read("(").is_err());
    }
}
