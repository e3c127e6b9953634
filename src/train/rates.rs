//! What each parameter is trained with: whether at all, its learning rate and its weight decay.

use regex::Regex;
use serde::Serialize;

use super::Settings;
use crate::eager::{Params, Trainable};
use crate::model::ops::Part;
use crate::{Result, bail_unusable, unusable};

/// How many names an error lists.
const LISTED: usize = 8;

/// The learning rate of each parameter that is trained.
#[derive(Clone, Debug)]
pub struct Rates {
    /// Peaks, in the order of the parameters that are trained, each with what its group is called.
    of: Vec<(f64, String)>,
}

/// Parameters that are trained alike.
#[derive(Clone, Debug, Serialize)]
pub struct Group {
    pub what: String,
    pub parameters: usize,
    pub numbers: usize,
    pub learning_rate: f64,
    pub weight_decay: f64,
}

impl Rates {
    /// The head learns at `--head-learning-rate`, and the body at `--learning-rate`, of which every layer has
    /// `--layer-decay` of what the layer above it has (Howard and Ruder 2018, arXiv:1801.06146). What stands in no layer
    /// of its own learns as the layer before it; the embeddings, below the first, have one factor more.
    pub fn new(params: &Params, settings: &Settings) -> Self {
        let layers =
            params.iter().filter_map(|(param, _)| layer(&param.name)).max().map_or(0, |last| last + 1);
        let decay = settings.layer_decay.unwrap_or(1.0);
        let plain = settings.layer_decay.is_none() && settings.head_learning_rate.is_none();
        let mut depth = 0; // 0 is below the first layer
        let mut all = Vec::new();
        // those that are frozen say where the others stand
        for (param, _) in params.iter() {
            if plain {
                all.push((settings.learning_rate, String::new()));
                continue;
            }
            if matches!(param.part, Part::Head | Part::Labels) {
                all.push((settings.head_learning_rate.unwrap_or(settings.learning_rate), "head".to_owned()));
                continue;
            }
            depth = layer(&param.name).map_or(depth, |layer| layer + 1);
            let rate = settings.learning_rate * decay.powi((layers - depth) as i32);
            let what = match (settings.layer_decay, depth) {
                (None, _) => "body".to_owned(),
                (Some(_), 0) => "embeddings".to_owned(),
                (Some(_), depth) => format!("layer {}", depth - 1),
            };
            all.push((rate, what));
        }
        let of = params.iter().zip(all).filter(|((param, _), _)| !params.is_frozen(&param.name));
        Self { of: of.map(|(_, own)| own).collect() }
    }

    /// The peak of a parameter's learning rate, by its place among those that are trained.
    pub fn peak(&self, index: usize) -> f64 {
        self.of[index].0
    }

    /// Parameters of one learning rate and weight decay together, in the order of the model.
    pub fn groups(&self, params: &Params, weight_decay: f64) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for (Trainable { param, .. }, (learning_rate, place)) in params.trainable().zip(&self.of) {
            let (kind, weight_decay) = match param.role.decays() {
                true => ("matrices and tables", weight_decay),
                false => ("biases and norms", 0.0),
            };
            let what = if place.is_empty() { kind.to_owned() } else { format!("{place}: {kind}") };
            match groups.iter_mut().find(|group| group.what == what) {
                Some(group) => {
                    group.parameters += 1;
                    group.numbers += param.numel();
                }
                None => groups.push(Group {
                    what,
                    parameters: 1,
                    numbers: param.numel(),
                    learning_rate: *learning_rate,
                    weight_decay,
                }),
            }
        }
        groups
    }
}

/// The number of the layer that a parameter's name speaks of: its first part that is a number.
fn layer(name: &str) -> Option<usize> {
    name.split('.').find_map(|part| part.parse().ok())
}

/// Leaves the parameters as they are whose names one of the patterns is found in.
///
/// # Errors
/// Unusable: a pattern that is none, or is found in no name; a parameter that is drawn anew, which would never learn; or
/// nothing is left to be trained.
pub fn freeze(params: &mut Params, patterns: &[String], new: &[String]) -> Result<()> {
    let mut found = Vec::with_capacity(patterns.len());
    for pattern in patterns {
        let regex = Regex::new(pattern)
            .map_err(|e| unusable!("--freeze {pattern:?} is no regular expression: {e}"))?;
        let own = || params.iter().map(|(param, _)| param.name.as_str()).filter(|name| regex.is_match(name));
        if own().next().is_none() {
            let names: Vec<&str> = params.iter().map(|(param, _)| param.name.as_str()).collect();
            bail_unusable!(
                "--freeze {pattern:?} is found in none of the {} parameters' names, such as {}",
                names.len(),
                names.iter().step_by(names.len().div_ceil(LISTED)).copied().collect::<Vec<_>>().join(", ")
            );
        }
        if let Some(name) = own().find(|name| new.iter().any(|new| new == name)) {
            bail_unusable!(
                "--freeze {pattern:?} freezes {name}, which is drawn anew and would never learn anything"
            );
        }
        found.push(regex);
    }
    params.freeze(|param| found.iter().any(|regex| regex.is_match(&param.name)));
    if params.trainable().next().is_none() {
        bail_unusable!("--freeze {}: no parameter is left that would be trained", patterns.join(", "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::eager::Init;
    use crate::model::ops::At;

    fn params() -> Params {
        let map = |at: At, name: &str| at.to(name).linear(2, 2).weight;
        let list = vec![
            At::body("embeddings").table(3, 2).weight,
            map(At::body("layer.0"), "a"),
            map(At::body("shared"), "b"),
            map(At::body("layer.1"), "a"),
            map(At::body("norm"), "c"),
            map(At::head("classifier"), "out"),
        ];
        Params::from_scratch(&list, Init { seed: 1, std: 0.02 }, &Device::Cpu).unwrap()
    }

    #[test]
    fn every_layer_learns_slower_than_the_one_above_it_and_the_head_at_its_own_rate() {
        let mut params = params();
        let settings = Settings {
            learning_rate: 1.0,
            layer_decay: Some(0.5),
            head_learning_rate: Some(8.0),
            ..Settings::default()
        };
        let peaks = |params: &Params, settings: &Settings| {
            let rates = Rates::new(params, settings);
            (0..params.trainable().count()).map(|i| rates.peak(i)).collect::<Vec<_>>()
        };
        assert_eq!(peaks(&params, &settings), [0.25, 0.5, 0.5, 1.0, 1.0, 8.0]);
        assert_eq!(peaks(&params, &Settings { head_learning_rate: None, ..settings.clone() })[5], 1.0);
        assert_eq!(peaks(&params, &Settings { learning_rate: 2.0, ..Settings::default() }), [2.0; 6]);
        freeze(&mut params, &[r"layer\.0|^emb".to_owned()], &[]).unwrap();
        assert_eq!(peaks(&params, &settings), [0.5, 1.0, 1.0, 8.0], "what is frozen moves no other");
    }

    #[test]
    fn patterns_that_freeze_nothing_everything_or_what_is_drawn_anew_are_refused() {
        let refused = |patterns: &[&str], new: &[&str]| {
            let owned = |list: &[&str]| list.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
            let error = freeze(&mut params(), &owned(patterns), &owned(new)).unwrap_err();
            assert_eq!(crate::error::exit_code(&error), 2);
            error.to_string()
        };
        assert!(refused(&["norm", "encoder"], &[]).contains("\"encoder\" is found in none"));
        assert!(refused(&["("], &[]).contains("no regular expression"));
        assert!(refused(&["."], &[]).contains("no parameter is left"));
        let said = refused(&["norm", "class"], &["classifier.out.weight"]);
        assert!(said.contains("freezes classifier.out.weight"), "{said}");
    }
}
