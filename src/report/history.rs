//! What a run has logged → its curves: of each name the numbers by step.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Result, bail_unusable, unusable};

/// Bytes of a line that are believed.
const LONGEST_LINE: u64 = 16 * 1024 * 1024;

/// A point of a curve; its number is NaN where the log has null, which stands for whatever is no number.
pub type Point = (u64, f64);

/// The curves of a run, in the order in which the log first has them.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Of `training/log.jsonl`: `loss`, `eval_accuracy` …
    pub curves: Vec<(String, Vec<Point>)>,
}

/// An audited step, as `training/audit.jsonl` has it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Audited {
    pub step: u64,
    pub parameters: Vec<Audit>,
}

/// What a step did to a parameter; null where that is no number.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Audit {
    pub name: String,
    pub grad_norm: Option<f64>,
    pub weight_norm: Option<f64>,
    pub update_norm: Option<f64>,
    pub update_ratio: Option<f64>,
    pub zeros: Option<f64>,
}

impl History {
    /// Reads a log; one that is not there has no curves.
    ///
    /// # Errors
    /// Unusable: it can't be read, or has a line that is none of a log's, with its number. The last line may be half written.
    pub fn read(path: &Path) -> Result<Self> {
        let mut curves: Vec<(String, Vec<Point>)> = Vec::new();
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        each_line(path, |line: Map<String, Value>| {
            let step = line.get("step").and_then(Value::as_u64)?;
            for (name, value) in line {
                let number = match &value {
                    Value::Number(number) => number.as_f64()?,
                    Value::Null => f64::NAN,
                    _ => continue,
                };
                if name == "step" {
                    continue;
                }
                let place = *places.entry(name.clone()).or_insert_with(|| {
                    curves.push((name, Vec::new()));
                    curves.len() - 1
                });
                curves[place].1.push((step, number));
            }
            Some(())
        })?;
        for (_, points) in &mut curves {
            points.sort_by_key(|(step, _)| *step); // is stable
        }
        Ok(Self { curves })
    }

    /// The points of a curve; none of one that was not logged.
    pub fn of(&self, name: &str) -> &[Point] {
        self.curves.iter().find(|(own, _)| own == name).map_or(&[], |(_, points)| points)
    }

    /// The curves of evaluations, by their metrics.
    pub fn evaluations(&self) -> impl Iterator<Item = (&str, &[Point])> {
        self.curves.iter().filter_map(|(name, points)| Some((name.strip_prefix("eval_")?, &points[..])))
    }

    /// The last step.
    pub fn steps(&self) -> u64 {
        self.curves.iter().filter_map(|(_, points)| points.last()).map(|(step, _)| *step).max().unwrap_or(0)
    }
}

/// The audited steps of a run; none where nothing was audited.
///
/// # Errors
/// As of [`History::read`].
pub fn audited(path: &Path) -> Result<Vec<Audited>> {
    let mut all = Vec::new();
    each_line(path, |audited| {
        all.push(audited);
        Some(())
    })?;
    Ok(all)
}

/// Hands on each line of a file of JSON lines; `take` refuses one by none.
fn each_line<T: serde::de::DeserializeOwned>(
    path: &Path,
    mut take: impl FnMut(T) -> Option<()>,
) -> Result<()> {
    let place = || path.display().to_string();
    let file = match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        file => file.map_err(|e| unusable!("{}: {e}", place()))?,
    };
    let mut lines = BufReader::new(file);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = lines.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line).with_context(place)?;
        if read == 0 {
            break;
        }
        let is_whole = line.last() == Some(&b'\n');
        let known = serde_json::from_slice(&line).ok().and_then(&mut take);
        if known.is_none() {
            if !is_whole && lines.fill_buf().with_context(place)?.is_empty() {
                break; // which is being written, or was when the run was killed
            }
            bail_unusable!("{}:{number}: no line of a run's log", place());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_read_by_name_and_step_and_a_broken_line_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log.jsonl");
        assert!(History::read(&path).unwrap().curves.is_empty());
        let text = "{\"step\":1,\"loss\":2.5,\"note\":\"x\"}\n{\"step\":2,\"loss\":null}\n{\"step\":2,\"eval_f1\":0.5}\n";
        std::fs::write(&path, format!("{text}{{\"step\":3,\"lo")).unwrap();
        let history = History::read(&path).unwrap();
        let loss = history.of("loss");
        assert!(loss[0] == (1, 2.5) && loss[1].0 == 2 && loss[1].1.is_nan() && loss.len() == 2);
        assert_eq!(history.evaluations().collect::<Vec<_>>(), [("f1", &[(2, 0.5)][..])]);
        assert_eq!((history.steps(), history.of("other").len()), (2, 0));
        for bad in ["x\n", "{\"step\":-1}\n", "[]\n", "{\"loss\":1}\n"] {
            std::fs::write(&path, format!("{text}{bad}{text}")).unwrap();
            let error = History::read(&path).unwrap_err();
            assert!(error.to_string().contains("log.jsonl:4:"), "{error}");
            assert_eq!(crate::error::exit_code(&error), 2);
        }
    }
}
