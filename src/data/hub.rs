//! A MODEL argument → a directory: as it is, or fetched from the hub into the ecosystem's cache.
//!
//! What stands whole in the cache is used without asking the hub again; `NAME@REVISION` asks for
//! another state of a model.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use hf_hub::api::Progress;
use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::data::tokens;
use crate::{Result, bail_unusable, checkpoint, unusable};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// How the hub is reached, and where its files are kept.
#[derive(Clone, Debug)]
pub struct HubOptions {
    pub endpoint: String,
    /// The directory of `models--OWNER--NAME`.
    pub cache: PathBuf,
    pub token: Option<String>,
    /// Use only what the cache holds.
    pub offline: bool,
    /// Show no progress.
    pub quiet: bool,
}

impl HubOptions {
    /// What the environment asks for, with `huggingface_hub`'s names and defaults: `HF_HOME`,
    /// `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN` (else the token that `hf auth login` stored),
    /// `HF_HUB_OFFLINE`.
    ///
    /// # Errors
    /// Unusable: neither `HF_HOME` nor a home directory is known.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// [`HubOptions::from_env`] for an environment that is given.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| variable(name).map(|value| value.to_string_lossy().trim().to_owned());
        let home = variable("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(variable("XDG_CACHE_HOME")?).join("huggingface")))
            .or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache/huggingface")))
            .ok_or_else(|| unusable!("there is no home directory for the hub's cache: set HF_HOME"))?;
        let stored = || std::fs::read_to_string(home.join("token")).ok().map(|token| token.trim().to_owned());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: text("HF_TOKEN").or_else(stored).filter(|token| !token.is_empty()),
            offline: text("HF_HUB_OFFLINE")
                .is_some_and(|value| ["1", "true", "yes", "on"].contains(&value.to_lowercase().as_str())),
            quiet: false,
            cache: variable("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
        })
    }
}

/// The directory of a MODEL: itself, or a hub id's (`OWNER/NAME`, `NAME`, either with `@REVISION`),
/// which is fetched where the cache lacks it.
///
/// # Errors
/// Unusable: neither a directory nor a model that can be had. Others: a download that breaks off.
pub fn model_dir(model: &str, quiet: bool) -> Result<PathBuf> {
    find(model, || Ok(HubOptions { quiet, ..HubOptions::from_env()? }))
}

/// [`model_dir`] with options other than the environment's.
pub fn model_dir_with(model: &str, options: &HubOptions) -> Result<PathBuf> {
    find(model, || Ok(options.clone()))
}

fn find(model: &str, options: impl FnOnce() -> Result<HubOptions>) -> Result<PathBuf> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    if path.exists() {
        bail_unusable!("{model} is a file; a model is a directory with config.json, or a hub id");
    }
    let Some((id, revision)) = hub_id(model) else {
        bail_unusable!("no such directory: {model:?} (nor can it be a hub id, OWNER/NAME)");
    };
    let options = options()?;
    let repo = Repo::with_revision(id.into(), RepoType::Model, revision.into());
    let cached = snapshot(&options.cache, &repo).filter(|dir| is_whole(dir));
    match cached {
        Some(dir) => Ok(dir),
        None if options.offline => bail_unusable!(
            "{model:?} is neither a directory nor whole in the cache {}, and HF_HUB_OFFLINE forbids asking the hub",
            options.cache.join(repo.folder_name()).display()
        ),
        None => fetch(model, repo, &options),
    }
}

/// Splits what can be a hub id into the id and the revision.
fn hub_id(model: &str) -> Option<(&str, &str)> {
    let (id, revision) = model.split_once('@').unwrap_or((model, "main"));
    let plain = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
    };
    let fits = id.split('/').count() <= 2 && id.split('/').all(plain) && revision.split('/').all(plain);
    fits.then_some((id, revision))
}

/// The cache's directory of a revision: a branch or tag, or a commit by its hash.
fn snapshot(cache: &Path, repo: &Repo) -> Option<PathBuf> {
    let folder = cache.join(repo.folder_name());
    let named = std::fs::read_to_string(folder.join("refs").join(repo.revision()));
    let commit = named.map_or_else(|_| repo.revision().to_owned(), |commit| commit.trim().to_owned());
    Some(folder.join("snapshots").join(commit)).filter(|dir| dir.is_dir())
}

/// Whether a snapshot has all that tk reads. A killed download leaves files that are whole, but not all.
fn is_whole(dir: &Path) -> bool {
    let has = |name: &str| dir.join(name).is_file();
    let sharded = || shards(dir).is_ok_and(|shards| shards.iter().all(|name| has(name)));
    has(CONFIG) && (has("tokenizer.json") || has("vocab.txt")) && (has(WEIGHTS) || sharded())
}

/// The files that the index of sharded weights names.
fn shards(dir: &Path) -> Result<BTreeSet<String>> {
    let path = dir.join(INDEX);
    let text = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
    let index: serde_json::Value =
        serde_json::from_slice(&text).map_err(|error| unusable!("{}: {error}", path.display()))?;
    let files = index["weight_map"].as_object().into_iter().flatten().filter_map(|(_, file)| file.as_str());
    let files: BTreeSet<_> = files.map(str::to_owned).collect();
    // they become paths in the cache
    match files.iter().find(|name| !checkpoint::is_file_name(name)) {
        Some(name) => Err(unusable!("{}: {name:?} is not the name of a file beside it", path.display())),
        None if files.is_empty() => Err(unusable!("{} names no file", path.display())),
        None => Ok(files),
    }
}

/// Downloads what the cache lacks.
fn fetch(model: &str, repo: Repo, options: &HubOptions) -> Result<PathBuf> {
    // ApiBuilder::from_env would read neither HF_TOKEN nor HF_HUB_CACHE
    let api = ApiBuilder::from_cache(Cache::new(options.cache.clone()))
        .with_endpoint(options.endpoint.clone())
        .with_token(options.token.clone())
        .with_retries(3)
        .with_user_agent("tk", env!("CARGO_PKG_VERSION"))
        .build()
        .context("making the hub's client")?;
    let api = api.repo(repo);
    let download = |name: &str| match options.quiet {
        true => api.download_with_progress(name, ()),
        false => api.download_with_progress(name, Shown::default()),
    };

    // config.json comes first: it tells the commit, and whether there is such a model at all
    let config = download(CONFIG).map_err(|error| refusal(model, &api, options, error))?;
    let dir = config.parent().ok_or_else(|| anyhow!("{} lies in no directory", config.display()))?;
    // false: the model has no such file
    let get = |name: &str| -> Result<bool> {
        if dir.join(name).is_file() {
            return Ok(true);
        }
        match download(name) {
            Ok(path) if path.parent() == Some(dir) => Ok(true),
            Ok(_) => Err(anyhow!("{model} was changed on the hub while it was fetched: try again")),
            Err(error) if status(&error) == Some(404) => Ok(false),
            Err(error) => Err(anyhow!(error).context(format!("fetching {}", api.url(name)))),
        }
    };
    for name in tokens::FILES {
        get(name)?;
    }
    if !get(WEIGHTS)? {
        if !get(INDEX)? {
            bail_unusable!("{model} has no {WEIGHTS} at {}, and tk reads no other weights", options.endpoint);
        }
        for name in shards(dir)? {
            if !get(&name)? {
                bail_unusable!("{model} lacks {name}, which its {INDEX} names");
            }
        }
    }
    Ok(dir.to_owned())
}

/// Why config.json could not be had.
fn refusal(model: &str, api: &ApiRepo, options: &HubOptions, error: ApiError) -> anyhow::Error {
    let url = api.url(CONFIG);
    match status(&error) {
        Some(404) => unusable!(
            "{model:?} is neither a directory nor found on the hub: there is no {url} (a model, or this revision of it)"
        ),
        Some(401 | 403) => unusable!(
            "{model:?} is no directory, and the hub refuses {url} ({error}): there is no such model, or it is private \
             or gated; {}",
            if options.token.is_some() { "the token may lack access to it" } else { "HF_TOKEN is not set" }
        ),
        _ => unusable!(
            "{model:?} is neither a directory nor in the cache {}, and the hub could not be asked for {url}: {error}",
            options.cache.display()
        ),
    }
}

/// The status of an HTTP response that is an error. ureq's type is not ours to name: hf-hub chooses the version.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(error) => error.to_string().strip_prefix("http status: ")?.parse().ok(),
        ApiError::TooManyRetries(error) => status(error),
        _ => None,
    }
}

/// A bar on a terminal, a line for each file elsewhere.
#[derive(Default)]
struct Shown {
    bar: Option<ProgressBar>,
}

impl Progress for Shown {
    /// Called once for the file and again for each try.
    fn init(&mut self, size: usize, filename: &str) {
        let bar = self.bar.get_or_insert_with(|| {
            if !std::io::stderr().is_terminal() {
                crate::say::tell(format!("fetching {filename} ({})", HumanBytes(size as u64)));
            }
            let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            ProgressBar::new(size as u64)
                .with_style(ProgressStyle::with_template(style).expect("a valid template"))
                .with_message(filename.to_owned())
        });
        bar.set_position(0);
    }

    fn update(&mut self, size: usize) {
        self.bar.iter().for_each(|bar| bar.inc(size as u64));
    }

    fn finish(&mut self) {
        self.bar.iter().for_each(|bar| bar.finish_and_clear());
    }
}
