//! `tk serve`: models over HTTP.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use serde_json::Map;

use crate::generate::Limits;
use crate::onnx::Precision;
use crate::predict::{Options, Predictor};
use crate::runtime::{EpFlags, Providers, log_to};
use crate::saved::{Saved, TaskFlag};
use crate::say::{Level, LogFormat, Say};
use crate::server::precision::{self, AskedPrecision};
use crate::server::queue::QueueLimits;
use crate::server::{Generator, GeneratorOptions, Load, Meter, Model, RequestLimits, Served};
use crate::task::AnswerFlags;
use crate::{Result, bail_unusable, files, generate, process, server, unusable};

/// Answer records over HTTP, in batches of about one length.
///
/// The routes are those of text-embeddings-inference (/predict, /embed, /similarity, /rerank, /tokenize, /decode), with
/// /entities, /answers and /fills, OpenAI's /v1/embeddings and /v1/completions, Cohere's /v1/rerank, and the Open Inference
/// Protocol's /v2; /openapi.json describes them, and / is a page to try the models. SIGTERM and Ctrl-C end the server once
/// all that it has taken is answered. SIGHUP loads the models anew from their directories, and so does /models/NAME/reload
/// for whoever has the key. There is no TLS: put a proxy in front of it.
#[derive(Clone, Debug, clap::Args)]
pub struct Args {
    /// The trained models' directories, exported by `tk export`; each is called by its last part, or NAME=DIR.
    #[arg(required = true, value_name = "[NAME=]DIR")]
    models: Vec<String>,
    #[command(flatten)]
    task: TaskFlag,
    /// The address; port 0 takes a free one, which is told.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:3000")]
    listen: SocketAddr,
    #[command(flatten)]
    ep: EpFlags,
    /// Which of the exported graphs: fp32, fp16 or int8, of language models fp32, fp16, q8 or q4; with --ep openvino also
    /// bf16. NAME= in front asks it of one model: --precision int8,chat=q4 [default: fp32].
    #[arg(long, value_name = "[NAME=]PRECISION", value_delimiter = ',')]
    precision: Vec<AskedPrecision>,
    /// Threads of a model on a CPU, each of which runs batches of its own; a language model's run one together [default: the
    /// cores].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1024))]
    threads: Option<u64>,
    /// Tokens of the longest window [default: what the model takes].
    #[arg(long, value_name = "N")]
    max_length: Option<usize>,
    /// Padded tokens of a batch [default: 256 on a CPU, 16384 on a GPU].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_batch_tokens: Option<u64>,
    /// How long a record waits for others at most, where a batch is not full and a session is idle, in microseconds
    /// [default: 0].
    #[arg(long, value_name = "N")]
    max_wait_us: Option<u64>,
    /// Of a language model, texts that are generated side by side [default: 48].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    slots: Option<u32>,
    /// Of a language model, megabytes that the keys and values of these texts may take [default: 2048].
    #[arg(long, value_name = "MB", value_parser = clap::value_parser!(u32).range(1..))]
    cache_mb: Option<u32>,
    /// Records that wait for a model at most, or prompts that are under way; more are refused with 429.
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u64).range(1..))]
    max_queue: u64,
    /// Bytes of a request's body.
    #[arg(long, value_name = "N", default_value_t = 2_000_000)]
    max_body: usize,
    /// Records of a request.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..))]
    max_records: u64,
    /// Tokens of a request's records, in all their windows.
    #[arg(long, value_name = "N", default_value_t = 131_072, value_parser = clap::value_parser!(u64).range(1..))]
    max_request_tokens: u64,
    /// Seconds after which a request is given up, with 503.
    #[arg(long, value_name = "X", default_value_t = 60.0)]
    timeout: f64,
    /// A file with the key that clients have to give, as `Authorization: Bearer KEY`.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// How stderr is written. Text tells of requests with -v; json, an object a line, tells of every request to a model its
    /// id, method, path, status and seconds, and, where they are known, the model, texts, tokens and the error.
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t)]
    log_format: LogFormat,
}

/// Loads every model, lets each answer once, and serves.
pub fn run(args: &Args, say: Say) -> Result<()> {
    let say = Say { log: args.log_format, ..say };
    if say.log == LogFormat::Json {
        log_to(say);
        std::panic::set_hook(Box::new(move |panic| say.entry(Level::Error, &panic.to_string(), Map::new())));
    }
    say.logged(serve(args, say))
}

fn serve(args: &Args, say: Say) -> Result<()> {
    let time = super::seconds("--timeout", args.timeout)?;
    let limits = RequestLimits {
        body: args.max_body,
        records: args.max_records.min(args.max_queue) as usize,
        tokens: args.max_request_tokens as usize,
        time,
    };
    let key = args.api_key_file.as_deref().map(key).transpose()?;
    let meter = Arc::new(Meter::default());
    let models = args.models.iter().map(|model| named(model)).collect::<Result<Vec<_>>>()?;
    let mut names = BTreeSet::new();
    if let Some((name, _)) = models.iter().find(|(name, _)| !names.insert(name.clone())) {
        bail_unusable!("two models are called {name}: name them as in {name}-2=DIR");
    }
    let names: Vec<&str> = models.iter().map(|(name, _)| name.as_str()).collect();
    let precisions = precision::of_models(&args.precision, &names)?;
    let place = |((name, dir), precision): (&(String, PathBuf), Precision)| {
        // of all of them before any is loaded: they choose the build of ONNX Runtime
        let providers = args.ep.providers(precision)?;
        Ok(Place { name: name.clone(), dir: dir.clone(), precision, providers })
    };
    let places = models.iter().zip(precisions).map(place).collect::<Result<Vec<_>>>()?;
    let load = loader(args.clone(), places, meter.clone(), say);
    let models = names.iter().map(|name| load(name)).collect::<Result<Vec<_>>>()?;
    let answers = |model: &Model| matches!(model, Model::Answers(_));
    check_said(args, !models.iter().any(answers), models.iter().all(answers))?;
    server::serve(args.listen, (models, load), meter, limits, key, say)
}

/// Where a model comes from, and which of its graphs is run by what.
struct Place {
    name: String,
    dir: PathBuf,
    precision: Precision,
    providers: Providers,
}

/// What loads a model by its name, at the start and again.
fn loader(args: Args, places: Vec<Place>, meter: Arc<Meter>, say: Say) -> Load {
    Box::new(move |asked| {
        let place = places.iter().find(|place| place.name == asked);
        let place = place.with_context(|| format!("there is no model {asked}"))?;
        let saved = Saved::open_for(&place.dir, &args.task)?;
        Ok(match saved.task.language_model() {
            Some(_) => Model::Generates(Arc::new(generator(&args, place, &saved, say)?)),
            None => Model::Answers(Arc::new(served(&args, place, &saved, &meter, say)?)),
        })
    })
}

/// Refuses flags that say nothing to any of the models.
fn check_said(args: &Args, none_answers: bool, none_generates: bool) -> Result<()> {
    let of_answers = [
        ("--max-length", args.max_length.is_some()),
        ("--max-batch-tokens", args.max_batch_tokens.is_some()),
        ("--max-wait-us", args.max_wait_us.is_some()),
    ];
    let of_texts = [("--slots", args.slots.is_some()), ("--cache-mb", args.cache_mb.is_some())];
    let given =
        |flags: &[(&'static str, bool)]| flags.iter().find(|(_, given)| *given).map(|(flag, _)| *flag);
    match (given(&of_answers), given(&of_texts)) {
        (Some(flag), _) if none_answers => {
            bail_unusable!("{flag} says nothing to language models; here is no other")
        }
        (_, Some(flag)) if none_generates => bail_unusable!("{flag} is for language models; here is none"),
        _ => Ok(()),
    }
}

/// A model's name and its directory.
fn named(model: &str) -> Result<(String, PathBuf)> {
    let (name, dir) = match model.split_once('=') {
        Some((name, dir)) if !Path::new(model).exists() => (name.to_owned(), PathBuf::from(dir)),
        _ => {
            let dir = PathBuf::from(model);
            let whole = dir.canonicalize().map_err(|e| unusable!("{model}: {e}"))?;
            (whole.file_name().unwrap_or_default().to_string_lossy().into_owned(), dir)
        }
    };
    if !files::is_plain_name(&name) {
        bail_unusable!(
            "{model}: {name:?} can't stand in an address: give NAME=DIR, with letters, digits, - _ and ."
        );
    }
    Ok((name, dir))
}

fn threads(args: &Args) -> usize {
    args.threads.map_or_else(process::cores, |n| n as usize)
}

/// A model that generates texts.
fn generator(args: &Args, place: &Place, saved: &Saved, say: Say) -> Result<Generator> {
    let providers = generate::providers(&args.ep, place.precision, say)?;
    let (precision, requests) = (place.precision, args.max_queue as usize);
    let limits = Limits::of(args.slots, args.cache_mb)?;
    let options =
        GeneratorOptions { providers: &providers, precision, threads: threads(args), limits, requests };
    Generator::start(place.name.clone(), saved, &options, say)
}

/// A model that answers records.
fn served(args: &Args, place: &Place, saved: &Saved, meter: &Arc<Meter>, say: Say) -> Result<Served> {
    let mut flags = AnswerFlags::default();
    flags.text_classification.logits = true; // for raw scores
    let options = Options {
        providers: &place.providers,
        threads: threads(args),
        batch_tokens: args.max_batch_tokens.map(|n| n as usize),
        max_length: args.max_length,
        flags: &flags,
    };
    let predictor = Predictor::open(saved, place.precision, &options, say)?;
    let limits = QueueLimits {
        records: args.max_queue as usize,
        batch_tokens: predictor.batch_tokens(),
        wait: Duration::from_micros(args.max_wait_us.unwrap_or(0)),
    };
    Served::start(place.name.clone(), saved, place.precision, predictor, &place.providers.how, limits, meter)
}

/// The key in a file, without the line's end.
fn key(path: &Path) -> Result<String> {
    let text = std::fs::read_to_string(path).map_err(|e| unusable!("{}: {e}", path.display()))?;
    let key = text.trim_end_matches(['\n', '\r']);
    if key.is_empty() || key.contains(|c: char| c.is_control() || c.is_whitespace()) {
        bail_unusable!("{}: expected one line, the key, without spaces", path.display());
    }
    Ok(key.to_owned())
}
