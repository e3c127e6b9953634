//! Models over HTTP: requests are records, or rows of tokens, that wait in a model's queue, and are answered in batches.
//!
//! ```text
//! body ─routes─▶ records ─served─▶ what is asked ─queue─▶ batches of about one length ─a thread a session─▶ answers ─routes─▶ body
//! ```

mod answers;
mod api;
pub mod completions;
mod compute;
pub mod forms;
mod generator;
pub mod inference;
mod log;
mod metrics;
mod openapi;
mod page;
pub mod precision;
pub mod queue;
pub mod refusal;
mod reload;
pub mod routes;
mod served;
pub mod signature;
mod status;
pub mod tensor;
pub mod tokens;

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, post};
use axum::serve::ListenerExt;
use serde_json::{Value, json};
use tokio::net::TcpListener;

pub use generator::{Generator, GeneratorOptions};
pub use metrics::Meter;
pub use reload::{Load, Model};
pub use served::Served;

use crate::data::tokens::Tokenizer;
use crate::say::Say;
use crate::{Result, unusable};
use completions::Completions;
use log::Work;
use refusal::{Manner, Refusal};
use reload::Current;
use routes::Route;
use status::ModelName;

/// What a request may ask for.
#[derive(Clone, Debug)]
pub struct RequestLimits {
    /// Bytes of a body.
    pub body: usize,
    /// Records of a request.
    pub records: usize,
    /// Tokens of all its windows.
    pub tokens: usize,
    /// How long it may take.
    pub time: Duration,
}

/// What all requests share.
struct App {
    models: Vec<Current>,
    /// What loads one of them anew, and who does so now.
    load: Load,
    reloading: Mutex<()>,
    limits: RequestLimits,
    /// What clients have to give as `Authorization: Bearer …`.
    key: Option<String>,
    meter: Arc<Meter>,
    /// The OpenAPI document.
    document: String,
    /// Whether new requests are taken.
    ready: AtomicBool,
    /// What no other server has, and the requests so far: both name a request.
    name: String,
    requests: AtomicU64,
    say: Say,
}

/// Bytes of a body that are tokenized where the request is read; more are left to a thread that may block.
const SMALL_BODY: usize = 16 * 1024;

/// Answers requests until SIGINT or SIGTERM, then those that were taken. SIGHUP loads all models anew by `load`.
///
/// # Errors
/// The address can't be listened on, or the server breaks down.
pub fn serve(
    listen: SocketAddr,
    (models, load): (Vec<Model>, Load),
    meter: Arc<Meter>,
    limits: RequestLimits,
    key: Option<String>,
    say: Say,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(crate::process::cores().min(4))
        .enable_all()
        .build()
        .context("starting the threads that read requests")?;
    let body = limits.body;
    let (ready, requests) = (AtomicBool::new(true), AtomicU64::new(0));
    // containers are all process 1: the time tells them apart
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let name = format!("{:x}-{:x}", std::process::id(), now.as_micros());
    let document = api::openapi(key.is_some()).context("the OpenAPI document")?;
    let (models, reloading) = (models.into_iter().map(Current::new).collect(), Mutex::new(()));
    let app =
        Arc::new(App { models, load, reloading, limits, key, meter, document, ready, name, requests, say });
    let done = runtime.block_on(async {
        let listener = TcpListener::bind(listen).await.map_err(|e| unusable!("--listen {listen}: {e}"))?;
        let address = listener.local_addr().context("the address that is listened on")?;
        let hangups = hangups(&app)?;
        let names: Vec<&str> = app.names().collect();
        // before anybody hears of it: who asks at once is not to kill it
        let asked_to_stop = stop_asked();
        say.line(format!("listening on http://{address}, with {}", names.join(", ")));
        if say.json {
            say.result("", &json!({"address": address.to_string(), "models": names}))?;
        }
        // answers are small and wanted at once
        let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let stopped = async {
            // an error is that nobody can ask any more
            let _ = stopped.await;
        };
        let service = api::router(app.clone()).layer(DefaultBodyLimit::max(body));
        let server = axum::serve(listener, service).with_graceful_shutdown(stopped);
        tokio::select! {
            done = server => done.context("serving"),
            () = hangups => Ok(()),
            () = async {
                asked_to_stop.await;
                app.ready.store(false, Ordering::Relaxed);
                say.line("stopping: what was taken is answered first");
                let _ = stop.send(());
                // a client that never ends its request is not waited for, nor is anyone by who asks twice
                tokio::select! {
                    () = tokio::time::sleep(app.limits.time) => {}
                    () = stop_asked() => {}
                }
            } => Ok(()),
        }
    });
    // what is left has nobody who waits for it
    runtime.shutdown_background();
    // a load that is under way is let end: the library must not be torn down below it
    drop(app.reloading.lock());
    app.models.iter().for_each(|current| current.get().stop());
    done
}

/// Loads all models anew at every SIGHUP, for ever. From this call on, the signal does not end the process.
fn hangups(app: &Arc<App>) -> Result<impl Future<Output = ()> + use<>> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let mut hangups = signal(SignalKind::hangup()).context("listening for SIGHUP")?;
        let app = app.clone();
        Ok(async move {
            while hangups.recv().await.is_some() {
                let app = app.clone();
                // its panics are caught
                let _ = tokio::task::spawn_blocking(move || app.reload_all()).await;
            }
            std::future::pending().await
        })
    }
    #[cfg(not(unix))]
    {
        let _ = app;
        Ok(std::future::pending())
    }
}

/// What is over once the process is asked to end; it is listened for from the call on.
fn stop_asked() -> impl Future<Output = ()> {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        let heard = [SignalKind::interrupt(), SignalKind::terminate()].map(signal);
        async move {
            let [interrupt, terminate] = heard.map(async |signal| match signal {
                Ok(mut signal) => drop(signal.recv().await),
                // where it can't be listened for, only the other one ends the server
                Err(_) => std::future::pending().await,
            });
            tokio::select! {
                () = interrupt => {}
                () = terminate => {}
            }
        }
    }
    #[cfg(not(unix))]
    async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// Asks the only model, or the one that the path or the body names.
fn asked(route: Route, path: &'static str) -> MethodRouter<Arc<App>> {
    post(move |State(app): State<Arc<App>>, ModelName(model): ModelName, request: Request| async move {
        app.handle(route, path, model, request).await
    })
}

/// Asks the only language model, or the one that the body names.
async fn complete(State(app): State<Arc<App>>, request: Request) -> Response {
    let heard = app.heard(&request, "/v1/completions", Manner::OpenAi);
    let completed = async {
        let asks = Completions::read(&app.body(request).await?)?;
        let generator = app.generator(asks.model.as_deref())?;
        asks.answer(&generator).await
    };
    app.counted(heard, completed).await
}

/// Asks the tokenizer of the only model, or of the one that the path names.
fn of_tokens(
    path: &'static str,
    answer: fn(&Tokenizer, &[u8]) -> Result<Value, Refusal>,
) -> MethodRouter<Arc<App>> {
    post(move |State(app): State<Arc<App>>, ModelName(model): ModelName, request: Request| async move {
        let heard = app.heard(&request, path, Manner::Tei);
        let answered = async {
            let body = app.body(request).await?;
            let model = app.any_model(model.as_deref())?;
            let answer = tokio::task::block_in_place(|| answer(model.tokenizer(), &body))?;
            let work = Work { model: model.name().to_owned(), ..Work::default() };
            Ok(work.of(axum::Json(answer).into_response()))
        };
        app.counted(heard, answered).await
    })
}

impl App {
    /// What the models are called.
    fn names(&self) -> impl Iterator<Item = &str> {
        self.models.iter().map(|current| current.name.as_str())
    }

    async fn handle(
        &self,
        route: Route,
        path: &'static str,
        model: Option<String>,
        request: Request,
    ) -> Response {
        let heard = self.heard(&request, path, route.manner());
        let answered = async { self.answer(route, model, &self.body(request).await?).await };
        self.counted(heard, answered).await
    }

    /// The body of a request that has the key.
    async fn body(&self, request: Request) -> Result<Bytes, Refusal> {
        self.check_key(request.headers())?;
        Bytes::from_request(request, &()).await.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => {
                Refusal::too_large(format!("the body has more than {} bytes", self.limits.body))
            }
            _ => Refusal::invalid(rejection.body_text()),
        })
    }

    /// The model of this name that answers records; the only one where none is named.
    fn model(&self, name: Option<&str>) -> Result<Arc<Served>, Refusal> {
        let answers = |model| match model {
            Model::Answers(model) => Some(model),
            Model::Generates(_) => None,
        };
        self.named(name, answers, "generates texts: ask it by /v1/completions")
    }

    /// The same of those that generate.
    fn generator(&self, name: Option<&str>) -> Result<Arc<Generator>, Refusal> {
        let generates = |model| match model {
            Model::Answers(_) => None,
            Model::Generates(model) => Some(model),
        };
        self.named(name, generates, "generates no texts")
    }

    /// The model of this name, whatever it does.
    fn any_model(&self, name: Option<&str>) -> Result<Model, Refusal> {
        self.named(name, Some, "")
    }

    fn named<M>(
        &self,
        name: Option<&str>,
        pick: impl Fn(Model) -> Option<M>,
        otherwise: &str,
    ) -> Result<M, Refusal> {
        let Some(name) = name else {
            let mut fitting = self.models.iter().filter_map(|current| pick(current.get()));
            return match (fitting.next(), fitting.next()) {
                (Some(only), None) => Ok(only),
                (None, _) => Err(Refusal::backend(format!("{} {otherwise}", self.all_names()))),
                (Some(_), Some(_)) => Err(Refusal::invalid(format!(
                    "there are several models: name one in the path (/models/NAME/…) or by \"model\": {}",
                    self.all_names()
                ))),
            };
        };
        let current = self.models.iter().find(|current| current.name == name);
        let model = current.ok_or_else(|| self.no_model(name))?.get();
        pick(model).ok_or_else(|| Refusal::backend(format!("{name} {otherwise}")))
    }

    fn no_model(&self, name: &str) -> Refusal {
        Refusal::unknown(format!("there is no model {name:?}; there is {}", self.all_names()))
    }

    fn all_names(&self) -> String {
        self.names().collect::<Vec<_>>().join(", ")
    }

    /// # Errors
    /// A key is asked for, and the request has none or another one.
    fn check_key(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let Some(key) = &self.key else { return Ok(()) };
        let given = headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
        let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
        if same(given, key.as_bytes()) { Ok(()) } else { Err(Refusal::unauthorized()) }
    }
}

/// Whether two keys are the same, in a time that tells nothing of where they differ.
fn same(given: &[u8], key: &[u8]) -> bool {
    let differ = given.iter().zip(key).fold(0, |differ, (a, b)| differ | (a ^ b));
    given.len() == key.len() && differ == 0
}

fn put(headers: &mut HeaderMap, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(HeaderName::from_static(name), value);
    }
}
