//! A sweep's file: what every run has and what differs → the settings of each run.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use toml::{Table, Value};

use super::stop::Stop;
use crate::say::nearest;
use crate::{Result, bail_unusable, unusable};

/// The most runs of a sweep: their names have three digits.
const MOST_RUNS: usize = 999;
/// How often a point that was drawn before is drawn again.
const TRIES: usize = 1000;
/// What a sweep's file has.
const KEYS: [&str; 7] = ["output", "stop", "grace-evaluations", "grace-runs", "train", "grid", "random"];
/// Options of `tk train` that the sweep itself gives, or that are no settings of a run.
const OWN: [&str; 7] = ["output", "resume", "overwrite", "dry-run", "strict", "verify-resume", "stop-at"];
/// Those without which runs can't be compared with each other.
const COMMON: [&str; 4] = ["task", "eval", "validation-split", "best-metric"];

/// Refuses settings that `tk train` would not take; the files of records that they name.
pub type FilesOf = fn(&Table) -> Result<Vec<PathBuf>>;

/// A sweep as its file describes it.
#[derive(Clone, Debug)]
pub struct Sweep {
    /// The file.
    pub path: PathBuf,
    pub output: PathBuf,
    pub stop: Stop,
    /// What every run has.
    train: Table,
    /// What each run has beside it.
    pub points: Vec<Table>,
    /// The files of records that runs read.
    pub records: BTreeSet<PathBuf>,
    /// All that the file says, with keys as `tk train` writes them.
    pub file: Table,
}

impl Sweep {
    /// Reads a file.
    ///
    /// # Errors
    /// Unusable: it can't be read, or has keys or values that say nothing, or that a run would refuse.
    pub fn read(path: &Path, files_of: FilesOf) -> Result<Self> {
        let place = path.display();
        let text = std::fs::read_to_string(path).map_err(|e| unusable!("{place}: {e}"))?;
        let file: Table = toml::from_str(&text).map_err(|e| unusable!("{place}: {e}"))?;
        Self::new(path, file, files_of).map_err(|error| error.context(place.to_string()))
    }

    fn new(path: &Path, file: Table, files_of: FilesOf) -> Result<Self> {
        let file = dashed(file)?;
        known(&file, "a sweep", &KEYS)?;
        let text = |key: &str| match file.get(key) {
            None => Ok(None),
            Some(Value::String(text)) if !text.is_empty() => Ok(Some(text.clone())),
            Some(other) => Err(unusable!("{key} is {other}, expected a text")),
        };
        let table = |key: &str| match file.get(key) {
            None => Ok(None),
            Some(Value::Table(table)) => Ok(Some(table)),
            Some(other) => Err(unusable!("{key} is {other}, expected a table [{key}]")),
        };
        let output =
            text("output")?.ok_or_else(|| unusable!("output, the directory to write, is missing"))?;
        let stop = Stop::read(
            text("stop")?.as_deref(),
            count(&file, "grace-evaluations")?,
            count(&file, "grace-runs")?,
        )?;
        let train =
            table("train")?.cloned().ok_or_else(|| unusable!("[train], what every run has, is missing"))?;
        if let Some(key) = train.keys().find(|key| OWN.contains(&key.as_str())) {
            bail_unusable!("[train] has {key}, which is no setting of a run");
        }
        if !["eval", "validation-split"].iter().any(|key| train.contains_key(*key)) {
            bail_unusable!(
                "[train] has no eval and no validation-split: runs are compared by what is measured there"
            );
        }
        let points = match (table("grid")?, table("random")?) {
            (Some(grid), None) => {
                differing(grid, "grid", &train)?;
                every(grid)?
            }
            (None, Some(random)) => {
                let mut ranges = random.clone();
                let runs = count(&ranges, "runs")?
                    .ok_or_else(|| unusable!("[random] has no runs: say how many are drawn"))?;
                let seed = seed(&ranges)?;
                ranges.remove("runs");
                ranges.remove("seed");
                differing(&ranges, "random", &train)?;
                drawn(&ranges, runs, seed)?
            }
            (None, None) => bail_unusable!("neither [grid] nor [random] says in what the runs differ"),
            (Some(_), Some(_)) => bail_unusable!("[grid] and [random] exclude each other"),
        };
        let (path, output, records) = (path.to_owned(), output.into(), BTreeSet::new());
        let mut sweep = Self { path, output, stop, train, points, records, file };
        for (at, point) in sweep.points.iter().enumerate() {
            let files = files_of(&sweep.settings(at));
            sweep.records.extend(
                files.map_err(|error| error.context(format!("run {} ({})", Self::name(at), told(point))))?,
            );
        }
        Ok(sweep)
    }

    /// The name of the run at a place.
    pub fn name(at: usize) -> String {
        format!("{:03}", at + 1)
    }

    /// All settings of a run, as a `--config` file has them.
    pub fn settings(&self, at: usize) -> Table {
        let mut settings = self.train.clone();
        settings.extend(self.points[at].clone());
        settings
    }
}

/// Keys with `-` for `_`, in this table and those inside.
///
/// # Errors
/// Unusable: a key stands there in both ways.
fn dashed(table: Table) -> Result<Table> {
    let mut all = Table::new();
    for (key, value) in table {
        let value = match value {
            Value::Table(table) => Value::Table(dashed(table)?),
            other => other,
        };
        let key = key.replace('_', "-");
        if all.contains_key(&key) {
            bail_unusable!("{key} stands there twice, with - and with _");
        }
        all.insert(key, value);
    }
    Ok(all)
}

/// # Errors
/// Unusable: a key that is none of these.
fn known(table: &Table, of: &str, keys: &[&str]) -> Result<()> {
    for key in table.keys() {
        if !keys.contains(&key.as_str()) {
            match nearest(key, keys) {
                Some(near) => bail_unusable!("{of} has no {key:?}; did you mean {near:?}?"),
                None => bail_unusable!("{of} has no {key:?}; it has {}", keys.join(", ")),
            }
        }
    }
    Ok(())
}

/// A whole number of at least 1.
fn count(table: &Table, key: &str) -> Result<Option<usize>> {
    let Some(value) = table.get(key) else { return Ok(None) };
    let number = value.as_integer().and_then(|number| usize::try_from(number).ok());
    match number.filter(|number| (1..=MOST_RUNS).contains(number)) {
        Some(number) => Ok(Some(number)),
        None => bail_unusable!("{key} is {value}, expected a whole number from 1 to {MOST_RUNS}"),
    }
}

fn seed(random: &Table) -> Result<u64> {
    let Some(value) = random.get("seed") else { return Ok(42) };
    let seed = value.as_integer().and_then(|seed| u64::try_from(seed).ok());
    seed.ok_or_else(|| unusable!("[random] seed is {value}, expected a whole number from 0"))
}

/// # Errors
/// Unusable: nothing differs, or what differs is none of a run's own settings or stands among what every run has.
fn differing(table: &Table, name: &str, train: &Table) -> Result<()> {
    if table.is_empty() {
        bail_unusable!("[{name}] has no option in which runs would differ");
    }
    for key in table.keys() {
        if OWN.contains(&key.as_str()) {
            bail_unusable!("[{name}] has {key}, which is no setting of a run");
        }
        if COMMON.contains(&key.as_str()) {
            bail_unusable!(
                "[{name}] has {key}: runs can only be compared where it is the same; put it into [train]"
            );
        }
        if train.contains_key(key) {
            bail_unusable!("{key} stands in [train] and in [{name}]");
        }
    }
    Ok(())
}

fn choices<'t>(key: &str, value: &'t Value) -> Result<&'t [Value]> {
    let list = match value.as_array() {
        Some(list) if !list.is_empty() => list,
        _ => bail_unusable!("{key} is {value}, expected a list of values, one at least"),
    };
    for (at, value) in list.iter().enumerate() {
        if list[..at].contains(value) {
            bail_unusable!("{key} has {value} twice");
        }
    }
    Ok(list)
}

/// Each combination, the last option the fastest.
fn every(grid: &Table) -> Result<Vec<Table>> {
    let mut points = vec![Table::new()];
    for (key, value) in grid {
        let choices = choices(key, value)?;
        if points.len().saturating_mul(choices.len()) > MOST_RUNS {
            bail_unusable!("[grid] has more than {MOST_RUNS} combinations");
        }
        let with = |point: &Table, choice: &Value| {
            let mut point = point.clone();
            point.insert(key.clone(), choice.clone());
            point
        };
        points =
            points.iter().flat_map(|point| choices.iter().map(move |choice| with(point, choice))).collect();
    }
    Ok(points)
}

/// So many different points, the same for the same seed.
fn drawn(ranges: &Table, runs: usize, seed: u64) -> Result<Vec<Table>> {
    let ranges: Vec<(&String, Range)> =
        ranges.iter().map(|(key, value)| Ok((key, Range::read(key, value)?))).collect::<Result<_>>()?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut points, mut seen) = (Vec::with_capacity(runs), BTreeSet::new());
    for _ in 0..runs {
        let mut point = || ranges.iter().map(|(key, range)| ((*key).clone(), range.draw(&mut rng))).collect();
        let point = (0..TRIES).map(|_| point()).find(|point: &Table| seen.insert(point.to_string()));
        points.push(point.ok_or_else(|| {
            unusable!("[random] asks for {runs} runs and has no more than {} different ones", seen.len())
        })?);
    }
    Ok(points)
}

/// What an option is drawn from.
enum Range<'t> {
    Choices(&'t [Value]),
    /// Whole numbers, the ends included.
    Whole {
        least: i64,
        most: i64,
        is_log: bool,
    },
    Numbers {
        least: f64,
        most: f64,
        is_log: bool,
    },
}

impl<'t> Range<'t> {
    /// A list to choose from, or `{ min, max, scale = "log" | "linear" }`; learning rates are drawn by their logarithm
    /// where nothing else is said.
    fn read(key: &str, value: &'t Value) -> Result<Self> {
        let Value::Table(table) = value else { return Ok(Self::Choices(choices(key, value)?)) };
        known(table, &format!("{key} in [random]"), &["min", "max", "scale"])?;
        let is_log = match table.get("scale").map(Value::as_str) {
            None => key.ends_with("learning-rate"),
            Some(Some("log")) => true,
            Some(Some("linear")) => false,
            Some(_) => bail_unusable!("{key}: scale is {}, expected \"log\" or \"linear\"", table["scale"]),
        };
        let end = |name: &str| table.get(name).ok_or_else(|| unusable!("{key}: {name} is missing"));
        let (least, most) = (end("min")?, end("max")?);
        let number =
            |value: &Value| value.as_float().or_else(|| value.as_integer().map(|number| number as f64));
        let ends = number(least).zip(number(most)).filter(|(a, b)| a.is_finite() && b.is_finite() && a < b);
        let Some((low, high)) = ends else {
            bail_unusable!("{key} goes from {least} to {most}, expected a number and a larger one");
        };
        if is_log && low <= 0.0 {
            bail_unusable!("{key} goes from {least}: by its logarithm, it has to be above 0");
        }
        Ok(match (least.as_integer(), most.as_integer()) {
            (Some(least), Some(most)) => Self::Whole { least, most, is_log },
            _ => Self::Numbers { least: low, most: high, is_log },
        })
    }

    fn draw(&self, rng: &mut ChaCha8Rng) -> Value {
        let share = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let between = |least: f64, most: f64, is_log: bool| match is_log {
            true => (least.ln() + share * (most.ln() - least.ln())).exp(),
            false => least + share * (most - least),
        };
        match *self {
            Self::Choices(list) => list[(share * list.len() as f64) as usize].clone(),
            Self::Whole { least, most, is_log } => {
                let number = between(least as f64, (most as f64) + 1.0, is_log).floor() as i64;
                Value::Integer(number.clamp(least, most))
            }
            Self::Numbers { least, most, is_log } => {
                let number = between(least, most, is_log);
                // four digits are enough, and can be read
                let short = format!("{number:.3e}").parse().unwrap_or(number);
                Value::Float(short.clamp(least, most))
            }
        }
    }
}

/// What differs, for people.
pub fn told(point: &Table) -> String {
    let told = |(key, value): (&String, &Value)| match value {
        Value::Float(number) => format!("{key} {}", number_told(*number)),
        Value::String(text) => format!("{key} {text}"),
        other => format!("{key} {other}"),
    };
    point.iter().map(told).collect::<Vec<_>>().join(", ")
}

fn number_told(number: f64) -> String {
    if number != 0.0 && number.abs() < 1e-2 { format!("{number:e}") } else { number.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Sweep, String> {
        let files_of: FilesOf = |settings| match settings.get("epochs").and_then(Value::as_integer) {
            Some(0) => Err(unusable!("--epochs is 0")),
            _ => Ok(vec!["e".into()]),
        };
        Sweep::new(Path::new("s.toml"), toml::from_str(text).unwrap(), files_of).map_err(|error| {
            assert_eq!(crate::error::exit_code(&error), 2);
            format!("{error:#}")
        })
    }

    const TOP: &str = "output = \"o\"\n[train]\neval = \"e\"\n";

    #[test]
    fn a_grid_is_every_combination() {
        let sweep =
            read(&format!("{TOP}[grid]\nlearning_rate = [1e-5, 2e-5]\nbatch-size = [8, 16, 32]\n")).unwrap();
        assert_eq!(sweep.points.len(), 6);
        let settings: Vec<String> = (0..6).map(|at| sweep.settings(at).to_string()).collect();
        assert_eq!(settings.iter().collect::<BTreeSet<_>>().len(), 6);
        assert!(settings.iter().all(|text| text.contains("eval = \"e\"")));
        assert_eq!(told(&sweep.points[4]), "learning-rate 2e-5, batch-size 16");
    }

    #[test]
    fn combinations_without_number_are_never_made() {
        let list = format!("{:?}", (1..=1000).collect::<Vec<_>>());
        let text = format!("{TOP}[grid]\nepochs = {list}\nbatch-size = {list}\nmax-length = {list}\n");
        assert!(read(&text).unwrap_err().contains("more than 999 combinations"));
    }

    #[test]
    fn what_is_drawn_lies_in_its_range_and_is_the_same_for_the_same_seed() {
        let text = |seed: u64| {
            format!(
                "{TOP}[random]\nruns = 300\nseed = {seed}\nlearning-rate = {{min = 1e-5, max = 1e-3}}\n\
                 dropout = {{min = 0, max = 0.5}}\nepochs = {{min = 1, max = 4}}\nbatch-size = [8, 16]\n"
            )
        };
        let points = |seed| read(&text(seed)).unwrap().points;
        assert_eq!(points(1), points(1));
        assert_ne!(points(1), points(2));
        let all = points(1);
        let numbers = |key: &str| -> Vec<f64> {
            all.iter()
                .map(|point| point[key].as_float().unwrap_or_else(|| point[key].as_integer().unwrap() as f64))
                .collect()
        };
        let share = |key: &str, of: &dyn Fn(f64) -> bool| {
            numbers(key).into_iter().filter(|&x| of(x)).count() as f64 / 300.0
        };
        assert_eq!(share("learning-rate", &|x| (1e-5..=1e-3).contains(&x)), 1.0);
        assert!((share("learning-rate", &|x| x < 1e-4) - 0.5).abs() < 0.1, "by the logarithm");
        assert!(
            (share("dropout", &|x| x < 0.25) - 0.5).abs() < 0.1 && share("dropout", &|x| x <= 0.5) == 1.0
        );
        for whole in [1.0, 2.0, 3.0, 4.0] {
            assert!((share("epochs", &|x| x == whole) - 0.25).abs() < 0.1);
        }
        assert!((share("batch-size", &|x| x == 8.0) - 0.5).abs() < 0.1);
    }

    #[test]
    fn what_says_nothing_is_refused_by_name() {
        let grid = "[grid]\nepochs = [1, 2]\n";
        for (text, says) in [
            (format!("outptu = \"o\"\n{grid}"), "did you mean \"output\"?"),
            (format!("[train]\neval = \"e\"\n{grid}"), "output, the directory to write, is missing"),
            (format!("output = \"o\"\n{grid}"), "[train], what every run has, is missing"),
            (format!("output = \"o\"\n[train]\nmodel = \"m\"\n{grid}"), "[train] has no eval"),
            (TOP.to_owned(), "neither [grid] nor [random]"),
            (format!("{TOP}[grid]\n"), "[grid] has no option"),
            (format!("{TOP}{grid}[random]\nruns = 2\n"), "exclude each other"),
            (format!("{TOP}[grid]\nepochs = [2, 0]\n"), "run 002 (epochs 0): --epochs is 0"),
            (format!("{TOP}[grid]\nepochs = [1, 2, 1]\n"), "epochs has 1 twice"),
            (format!("{TOP}batch_size = 1\nbatch-size = 2\n{grid}"), "batch-size stands there twice"),
            (format!("{TOP}resume = true\n{grid}"), "[train] has resume"),
            (format!("{TOP}[grid]\nbest-metric = [\"loss\"]\n"), "put it into [train]"),
            (format!("{TOP}[grid]\nepochs = 3\n"), "expected a list of values, one at least"),
            (format!("{TOP}[grid]\nepochs = []\n"), "expected a list of values, one at least"),
            (format!("{TOP}[grid]\noutput = [\"a\"]\n"), "[grid] has output"),
            (format!("{TOP}epochs = 1\n{grid}"), "epochs stands in [train] and in [grid]"),
            (format!("{TOP}[random]\nepochs = [1]\n"), "[random] has no runs"),
            (format!("{TOP}[random]\nruns = 1_000_000_000\nepochs = [1]\n"), "from 1 to 999"),
            (format!("{TOP}[random]\nruns = 1\nseed = -1\nepochs = [1]\n"), "seed is -1"),
            (format!("{TOP}[random]\nruns = 0\nepochs = [1]\n"), "runs is 0"),
            (format!("{TOP}[random]\nruns = 3\nepochs = [1, 2]\n"), "no more than 2 different ones"),
            (format!("{TOP}[random]\nruns = 3\nepochs = {{min = 2, max = 2}}\n"), "and a larger one"),
            (
                format!("{TOP}[random]\nruns = 3\nepochs = {{min = 2, mx = 4}}\n"),
                "epochs in [random] has no \"mx\"",
            ),
            (format!("{TOP}[random]\nruns = 3\nlearning-rate = {{min = 0, max = 0.1}}\n"), "above 0"),
            (format!("stop = \"none\"\ngrace-runs = 2\n{TOP}{grid}"), "say nothing"),
            (format!("stop = \"mean\"\n{TOP}{grid}"), "stop is \"mean\""),
            (format!("grace-runs = -1\n{TOP}{grid}"), "grace-runs is -1"),
        ] {
            let said = read(&text).unwrap_err();
            assert!(said.contains(says), "{text}: {said}");
        }
    }
}
