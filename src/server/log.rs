//! What is told of each request: the name that it has or is given, what became of it, and how long that took. As text, `-v`
//! tells of it; as JSON, an object a line, every request is told of.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::http::{HeaderMap, Method};
use axum::response::Response;
use serde_json::{Map, Value, json};

use super::refusal::{Manner, Refusal};
use super::{App, put};
use crate::say::{Level, LogFormat};

/// The header that names a request.
const REQUEST_ID: &str = "x-request-id";

/// The longest name that is taken over.
const LONGEST_ID: usize = 128;

/// The most characters of a path, or of why a request was refused, that are told.
const LONGEST_TEXT: usize = 512;

/// A request as it came.
pub(super) struct Heard {
    id: String,
    method: Method,
    path: String,
    /// What it is counted as.
    route: &'static str,
    /// The form of its errors.
    manner: Manner,
    started: Instant,
}

/// What a response was made by, as far as it is told in the log. It goes with the response as an extension.
#[derive(Clone, Default)]
pub(super) struct Work {
    pub model: String,
    /// Texts, records, rows or prompts.
    pub texts: Option<usize>,
    pub tokens: Option<usize>,
}

impl Work {
    /// The response, of which this is told.
    pub fn of(self, mut response: Response) -> Response {
        response.extensions_mut().insert(self);
        response
    }
}

impl App {
    /// Takes note of a request.
    pub(super) fn heard(&self, request: &Request, route: &'static str, manner: Manner) -> Heard {
        let id = self.request_id(request.headers());
        let path = bounded(request.uri().path());
        Heard { id, method: request.method().clone(), path, route, manner, started: Instant::now() }
    }

    /// What the client calls its request, or a name that no other request has.
    fn request_id(&self, headers: &HeaderMap) -> String {
        let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
        let given = given.filter(|id| !id.is_empty() && id.len() <= LONGEST_ID);
        let next = || format!("{}-{}", self.name, self.requests.fetch_add(1, Ordering::Relaxed));
        given.map_or_else(next, str::to_owned)
    }

    /// Answers a request within its time, counts it, and tells of it.
    pub(super) async fn counted(
        &self,
        heard: Heard,
        answer: impl Future<Output = Result<Response, Refusal>>,
    ) -> Response {
        let time = self.limits.time;
        // what is not answered by then is taken back, as where the client goes
        let answered = tokio::time::timeout(time, answer).await;
        let answered = answered.unwrap_or_else(|_| Err(Refusal::late(time.as_secs_f64())));
        self.finished(&heard, answered)
    }

    /// Counts what a request was answered, and tells of it.
    pub(super) fn finished(&self, heard: &Heard, answered: Result<Response, Refusal>) -> Response {
        let error = answered.as_ref().err().map(|refusal| bounded(&refusal.message));
        let mut response = answered.unwrap_or_else(|refusal| refusal.response(heard.manner));
        let took = heard.started.elapsed();
        put(response.headers_mut(), "x-total-time", &took.as_millis().to_string());
        put(response.headers_mut(), REQUEST_ID, &heard.id);
        let (status, route) = (response.status().as_u16(), heard.route);
        self.meter.request(route, status, took);
        match self.say.log {
            LogFormat::Text => {
                let ms = (took.as_secs_f64() * 1e5).round() / 100.0;
                let line = json!({"request": heard.id, "route": route, "status": status, "ms": ms});
                self.say.detail(line.to_string());
            }
            LogFormat::Json => self.log(heard, status, took, error, response.extensions_mut().remove()),
        }
        response
    }

    fn log(&self, heard: &Heard, status: u16, took: Duration, error: Option<String>, work: Option<Work>) {
        let Heard { id, method, path, .. } = heard;
        let seconds = (took.as_secs_f64() * 1e6).round() / 1e6;
        let Work { model, texts, tokens } = work.unwrap_or_default();
        let model = Some(model).filter(|model| !model.is_empty());
        let fields = [
            ("id", json!(id)),
            ("method", json!(method.as_str())),
            ("path", json!(path)),
            ("status", json!(status)),
            ("seconds", json!(seconds)),
            ("model", json!(model)),
            ("texts", json!(texts)),
            ("tokens", json!(tokens)),
            ("error", json!(error)),
        ];
        let fields = fields.into_iter().filter(|(_, value)| !value.is_null());
        let fields: Map<String, Value> = fields.map(|(name, value)| (name.to_owned(), value)).collect();
        let level = if status >= 500 { Level::Error } else { Level::Info };
        self.say.entry(level, &format!("{method} {path} {status}"), fields);
    }
}

/// The beginning of a text that a client has sent.
fn bounded(text: &str) -> String {
    text.chars().take(LONGEST_TEXT).collect()
}
