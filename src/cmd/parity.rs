//! `tk parity`: a trained model and records → how far its runtimes are apart.

use std::path::{Path, PathBuf};

use anyhow::Context;
use serde_json::json;

use crate::data::batch::Encoding;
use crate::data::records::{self, Files};
use crate::files::Destination;
use crate::onnx::{DEFAULT_OPSET, GraphKind, Precision, model, write};
use crate::parity::inputs::{self, Text};
use crate::parity::page::{self, About};
use crate::parity::{self, Compared, Runtime, Subject, decoding, detail, report};
use crate::predict::graphs;
use crate::runtime::{How, Provider, Providers, library};
use crate::saved::{Saved, TaskFlag};
use crate::say::Say;
use crate::task::{Example, Form, RecordFlags, TextColumns};
use crate::{Result, bail_unusable};

/// Hold the logits of a model's runtimes against each other; exit code 1 where they differ.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The trained model's directory.
    #[arg(required_unless_present = "onnx")]
    dir: Option<PathBuf>,
    #[command(flatten)]
    task: TaskFlag,
    /// A graph that another program exported, to be held against the model of --against.
    #[arg(long, value_name = "FILE", requires = "against", conflicts_with = "dir")]
    onnx: Option<PathBuf>,
    /// The directory of the model that --onnx is of.
    #[arg(long, value_name = "DIR", requires = "onnx")]
    against: Option<PathBuf>,
    /// Records to compare on, as for `tk eval` [default: a built-in set of awkward ones].
    #[arg(long, value_name = "FILE")]
    input: Vec<PathBuf>,
    /// The runtimes, the first of which the others are held against: eager, candle-onnx, ort-cpu,
    /// ort-openvino, ort-cuda, ort-tensorrt [default: all that this machine has; of bf16 eager and ort-openvino].
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    runtimes: Vec<Runtime>,
    /// Which of the exported graphs: fp32, fp16 or int8, and for language models fp32 or fp16; bf16 is the graph in fp32 as
    /// OpenVINO computes it then.
    #[arg(long, value_enum, default_value_t, conflicts_with = "onnx")]
    precision: Precision,
    /// How far a logit may be from the reference's [default: 1e-4; of fp16, int8 and bf16 twice of what
    /// `tk export` found].
    #[arg(long, value_name = "X")]
    tolerance: Option<f32>,
    /// Write a page that stands on its own: the table, differences layer by layer, the records that differ most, hashes,
    /// versions and the machine.
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Tokens of the longest record [default: what the model takes].
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Measure the task's metric by each runtime too; the records have labels then.
    #[arg(long, requires = "input")]
    metrics: bool,
    #[command(flatten)]
    records: RecordFlags,
}

/// Runs everything, prints the table, and fails where it says so.
pub fn run(args: &Args, say: Say) -> Result<()> {
    if let Some(tolerance) = args.tolerance.filter(|x| !(*x >= 0.0 && x.is_finite())) {
        bail_unusable!("--tolerance {tolerance}: expected a number from 0 upwards");
    }
    let destination = args.report.as_deref().map(Destination::of).transpose()?;
    let dir = args.dir.as_ref().or(args.against.as_ref()).context("no model's directory")?;
    let how = how(args)?;
    let saved = Saved::open_for(dir, &args.task)?;
    let tolerance = tolerance(args, &saved)?;
    let max_length = saved.checked_max_length(args.max_length)?;
    let (mut runtimes, lacking) = match args.precision {
        Precision::Bf16 => pick(&[Runtime::Eager, Runtime::Ort(Provider::OpenVino)], saved.task.form())?,
        _ => pick(&args.runtimes, saved.task.form())?,
    };
    if args.precision != Precision::Fp32 {
        runtimes.retain(|&runtime| runtime != Runtime::CandleOnnx);
    }
    if args.onnx.is_some() {
        if args.runtimes.contains(&Runtime::CandleOnnx) {
            bail_unusable!("candle-onnx runs graphs that tk writes; an --onnx is run by ONNX Runtime");
        }
        runtimes.retain(|&runtime| runtime != Runtime::CandleOnnx);
        if runtimes.len() < 2 {
            let why: Vec<String> = lacking.iter().map(|(name, why)| format!("\n  {name}: {why}")).collect();
            bail_unusable!("nothing to run the graph by{}", why.concat());
        }
    }
    for (name, why) in &lacking {
        say.line(format!("{name} is not on this machine: {why}"));
    }
    let input = match &args.input[..] {
        [] => None,
        names => Some(Files::named(names, args.records.reading.format)?),
    };
    let examples = match &input {
        Some(files) if args.metrics => Some(saved.examples(files, &args.records, max_length, say)?),
        _ => None,
    };
    let texts = if examples.is_some() { Vec::new() } else { texts(args, input.as_ref(), &saved)? };
    let encodings = match &examples {
        Some(examples) => examples.iter().flat_map(Example::encodings).cloned().collect(),
        None => saved.tokenizer.encode_all(&texts, max_length)?,
    };

    let scratch = write::Scratch::new(&std::env::temp_dir())?; // for graphs that are not there
    let graph = |path: PathBuf, kind: GraphKind| -> Result<PathBuf> {
        if path.exists() {
            graphs::check_fresh(&saved, &path, kind.precision)?;
            return Ok(path);
        }
        say.line(format!(
            "{} is not there; comparing the graph that `tk export` would write",
            path.display()
        ));
        let hash = saved.tokenizer.hash();
        let model = model::build(&saved.config, &saved.task, &saved.weights, hash, kind)?;
        let path = scratch.path().join(path.file_name().unwrap_or_default());
        write::save(model, &path, false)?;
        Ok(path)
    };
    let form = saved.task.form();
    let model = match &args.onnx {
        Some(path) => path.clone(),
        None if args.precision != Precision::Fp32 => graphs::fresh(&saved, args.precision)?,
        None => graph(graphs::path(dir), GraphKind::fp32(form, DEFAULT_OPSET))?,
    };

    let examples = examples.as_deref();
    let subject = Subject { saved: &saved, graph: &model, how: &how, encodings: &encodings, examples };
    let mut details = Vec::new();
    let compared = match form {
        Form::Whole => {
            let compared = parity::run(&subject, &runtimes, tolerance)?;
            if destination.is_some() {
                let others = runtimes.iter().filter(|&&runtime| runtime != Runtime::Eager);
                let detail = |&runtime: &Runtime| detail::of(&subject, runtime, &texts);
                details = others.map(detail).collect::<Result<_>>()?;
            }
            compared
        }
        Form::Cached | Form::InPlace => {
            let texts = if input.is_some() { encodings.clone() } else { decoding::few(&encodings) };
            if runtimes[0] != Runtime::Eager {
                bail_unusable!("a language model is compared with eager: name it among --runtimes");
            }
            let mut compared = match args.precision {
                Precision::Fp32 => of_language_model(&saved, &model, &texts, &runtimes, tolerance)?,
                _ => Vec::new(), // model.onnx, which the ecosystem reads, is in fp32 alone
            };
            for provider in generating(args, &runtimes)? {
                let generating = match args.precision {
                    Precision::Fp32 => {
                        let path = graphs::generating(dir, Precision::Fp32);
                        graph(path, GraphKind::in_place(Precision::Fp32))?
                    }
                    _ => model.clone(),
                };
                let mut in_place = decoding::in_place(&saved, &generating, &texts, provider, tolerance)?;
                let measure = |examples| decoding::measure(&saved, &generating, provider, examples);
                in_place.metric = examples.map(measure).transpose()?;
                compared.push(in_place);
            }
            compared
        }
    };
    let pass = compared.iter().all(|c| c.pass);
    if let Some(destination) = &destination {
        let title = args.onnx.as_ref().unwrap_or(dir).display().to_string();
        let about = About::of(title, &subject, lacking.clone())?;
        destination.write(page::html(&about, &compared, &details))?;
    }
    let lacking: Vec<_> = lacking.iter().map(|(name, why)| json!({"name": name, "reason": why})).collect();
    say.result(
        report::table(&compared),
        &json!({"pass": pass, "runtimes": compared, "reference": runtimes[0].name(), "lacking": lacking}),
    )?;
    if !pass {
        let names: Vec<&str> = compared.iter().filter(|c| !c.pass).map(|c| c.name).collect();
        anyhow::bail!("{} differ from {} by more than {}", names.join(", "), runtimes[0].name(), tolerance);
    }
    Ok(())
}

/// How providers compute, and the build of ONNX Runtime that is loaded for them.
fn how(args: &Args) -> Result<How> {
    let openvino = Runtime::Ort(Provider::OpenVino);
    if args.precision != Precision::Bf16 {
        if args.runtimes.contains(&openvino) {
            library::prefer_openvino();
        }
        return Ok(How::default());
    }
    let others = args.runtimes.iter().any(|&runtime| runtime != openvino && runtime != Runtime::Eager);
    if others || args.runtimes.len() == 1 {
        bail_unusable!(
            "--precision bf16 is computed by OpenVINO, and held against eager: leave --runtimes out"
        );
    }
    Ok(Providers::openvino_in_bf16()?.how)
}

/// How far a logit may be from the reference's, where nobody says it: what rounding to f32 explains; of fewer bits twice
/// of what the export found and the manifest says, on the same built-in texts.
fn tolerance(args: &Args, saved: &Saved) -> Result<f32> {
    if args.precision != Precision::Fp32 {
        graphs::check_precision(saved, args.precision)?;
        if matches!(args.precision, Precision::Q8 | Precision::Q4) {
            bail_unusable!(
                "--precision {}: what a language model's graph in blocks loses is measured by `tk eval --runtime onnx`",
                args.precision
            );
        }
        if args.runtimes.contains(&Runtime::CandleOnnx) {
            bail_unusable!("candle-onnx knows no products in {}: leave it out", args.precision);
        }
    }
    match (args.tolerance, args.precision) {
        (Some(tolerance), _) => Ok(tolerance),
        (None, Precision::Fp32) => Ok(parity::TOLERANCE),
        (None, precision) => graphs::tolerance(saved, precision),
    }
}

/// Holds a language model's graph against candle on each of the runtimes.
fn of_language_model(
    saved: &Saved,
    graph: &Path,
    encodings: &[Encoding],
    runtimes: &[Runtime],
    tolerance: f32,
) -> Result<Vec<Compared>> {
    let others = runtimes.iter().filter(|&&runtime| runtime != Runtime::Eager);
    others
        .map(|runtime| match runtime {
            Runtime::Ort(provider) => decoding::run(saved, graph, encodings, *provider, tolerance),
            other => bail_unusable!(
                "{} is handed no past: compare a language model on eager and ort-cpu",
                other.name()
            ),
        })
        .collect()
}

/// The providers of ONNX Runtime among the runtimes that a language model's graph generates on in this precision.
///
/// # Errors
/// Unusable: there is none of them, or another one was asked for, where no other graph is compared.
fn generating(args: &Args, runtimes: &[Runtime]) -> Result<Vec<Provider>> {
    if args.onnx.is_some() {
        return Ok(Vec::new());
    }
    let on = |provider: &Provider| match provider {
        Provider::Cpu => true,
        Provider::Cuda => args.precision == Precision::Fp16,
        Provider::OpenVino | Provider::TensorRt => false,
    };
    let providers: Vec<Provider> = Provider::ALL
        .into_iter()
        .filter(|provider| on(provider) && runtimes.contains(&Runtime::Ort(*provider)))
        .collect();
    let generates =
        |runtime: &Runtime| matches!(runtime, Runtime::Eager | Runtime::Ort(Provider::Cpu | Provider::Cuda));
    if args.precision != Precision::Fp32 && (providers.is_empty() || !args.runtimes.iter().all(generates)) {
        bail_unusable!(
            "--precision {}: texts are generated by ort-cpu and ort-cuda: name these beside eager, and no other",
            args.precision
        );
    }
    Ok(providers)
}

/// The runtimes to compare, the reference first, and what this machine lacks of the default ones.
type Picked = (Vec<Runtime>, Vec<(&'static str, String)>);

fn pick(asked: &[Runtime], form: Form) -> Result<Picked> {
    let mut lacking = Vec::new();
    let mut runtimes = Vec::new();
    if asked.is_empty() {
        for runtime in Runtime::ALL {
            if (runtime, form) == (Runtime::CandleOnnx, Form::Cached) {
                continue; // tk hands it no past
            }
            match runtime.available() {
                Ok(()) => runtimes.push(runtime),
                Err(why) => lacking.push((runtime.name(), format!("{why:#}"))),
            }
        }
    } else {
        for &runtime in asked {
            runtime.available()?;
            if runtimes.contains(&runtime) {
                bail_unusable!("--runtimes names {} twice", runtime.name());
            }
            runtimes.push(runtime);
        }
        // what was trained is the reference wherever it takes part
        runtimes.sort_by_key(|&runtime| runtime != Runtime::Eager);
    }
    if runtimes.len() < 2 {
        let only: Vec<&str> = runtimes.iter().map(|runtime| runtime.name()).collect();
        let why: Vec<String> = lacking.iter().map(|(name, why)| format!("\n  {name}: {why}")).collect();
        bail_unusable!("nothing to compare: the only runtime is {}{}", only.join(", "), why.concat());
    }
    Ok((runtimes, lacking))
}

fn texts(args: &Args, input: Option<&Files>, saved: &Saved) -> Result<Vec<Text>> {
    let Some(files) = input else {
        if args.records != RecordFlags::default() {
            bail_unusable!("flags of records are for an --input; here is none");
        }
        return inputs::builtin(saved);
    };
    args.records.check_of_texts().map_err(|error| error.context("without --metrics"))?;
    let columns = args.records.texts.columns();
    records::read_examples(files, &args.records.reading.how(), |row| TextColumns::read(&columns, &row))
}
