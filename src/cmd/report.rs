//! `tk report`: a trained model's directory → one page of its run, its errors and its graphs; and a model card.

use std::path::PathBuf;

use serde_json::json;

use crate::data::records::Files;
use crate::files::Destination;
use crate::report::{self, Asked, Report, card, page};
use crate::saved::{Saved, TaskFlag};
use crate::say::Say;
use crate::task::RecordFlags;
use crate::{Result, bail_unusable, device};

/// Make one page of a run: its curves, where the model is wrong, its exported graphs, its data and settings.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The trained model's directory.
    dir: PathBuf,
    #[command(flatten)]
    task: TaskFlag,
    /// Labelled records to measure on [default: the run's --eval, where the file is still the same].
    #[arg(long, value_name = "FILE", num_args = 1..)]
    input: Vec<PathBuf>,
    /// The page, which stands on its own; - is standard output [default: DIR/report.html].
    #[arg(long, value_name = "FILE.html|-")]
    output: Option<PathBuf>,
    /// Write DIR/README.md too, a model card as the Hugging Face hub reads it: metrics, how to use the model, how it was
    /// trained, and marked places for what its author alone knows. It is written anew as long as its first comment stands
    /// there, and any other README.md is left alone.
    #[arg(long)]
    card: bool,
    /// With --card, replace a README.md that is not tk's.
    #[arg(long, requires = "card")]
    overwrite: bool,
    /// Tokens of the longest example [default: what the model takes].
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Where candle computes: cpu, cuda or cuda:N.
    #[arg(long, default_value = "cpu")]
    device: String,
    #[command(flatten)]
    records: RecordFlags,
}

/// Measures, and writes the page and the card.
pub fn run(args: &Args, say: Say) -> Result<()> {
    if args.input.is_empty() {
        args.records.check_none()?;
    }
    let output = match &args.output {
        Some(path) if path.as_os_str() == "-" => Destination::STDOUT,
        Some(path) => Destination::of(path)?,
        None => Destination::of(&args.dir.join(report::PAGE))?,
    };
    let is_printed = output == Destination::STDOUT;
    if is_printed && say.json {
        bail_unusable!("the page and --json both go to standard output: name another --output");
    }
    let saved = Saved::open_for(&args.dir, &args.task)?;
    let to = args.card.then(|| card::destination(&args.dir, args.overwrite)).transpose()?;
    let device = device::open(&args.device)?;
    let files = Files::named(&args.input, args.records.reading.format);
    let files = if args.input.is_empty() { None } else { Some(files?) };
    let input = files.as_ref().map(|files| (files, &args.records));
    let asked = Asked { input, max_length: args.max_length, device: &device };
    let report = Report::new(&saved, &asked, say)?;
    output.write(page::html(&report)?)?;
    if let Some(to) = &to {
        crate::files::write(to, card::markdown(&report))?;
    }
    let mut result = report.json();
    result.insert("report".to_owned(), json!(output.to_string()));
    let mut human = output.to_string();
    if let Some(to) = &to {
        human += &format!(", {}", to.display());
        result.insert("card".to_owned(), json!(to.display().to_string()));
    }
    if let Some((metrics, on)) = report.metrics() {
        let shown: Vec<String> = metrics.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
        human += &format!(": {} on {on}", shown.join("  "));
    }
    if is_printed {
        say.line(human);
        return Ok(());
    }
    say.result(human, &result)
}
