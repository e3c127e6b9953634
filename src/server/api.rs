//! What stands at which address: one list, of which both the router and the OpenAPI document are made.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, get, post};
use utoipa::openapi::HttpMethod;

use super::answers::{
    CohereRanks, Embeddings, InferenceModel, InferenceReady, InferenceServer, Inferred, Info, Label,
    ListedModels, Live, ModelInfo, Rank, Ready, Token,
};
use super::completions::{Completion, CompletionsBody};
use super::inference::InferBody;
use super::openapi::{self, Body, list, of, one_or_all, plain};
use super::refusal::Manner;
use super::routes::{self, Route};
use super::tokens::{Decode, Tokenize};
use super::{App, asked, complete, inference, of_tokens, page, reload, status, tokens};
use crate::task::masked_lm::Fill;
use crate::task::question_answering::Part;
use crate::task::token_classification::decode::Found;

/// What an address answers.
pub(super) enum Answers {
    Json(Body),
    /// JSON that this document does not describe: itself.
    Document,
    /// Of this type.
    Text(&'static str),
    /// A file of the page, of this type.
    Page(&'static str),
    /// JSON, or server-sent events of it.
    JsonOrEvents(Body),
    /// JSON, alone or with binary data behind it, as the request has it, too.
    JsonOrBinary(Body),
}

impl Answers {
    pub(super) fn body(&self) -> Option<&Body> {
        match self {
            Self::Json(body) | Self::JsonOrEvents(body) | Self::JsonOrBinary(body) => Some(body),
            Self::Document | Self::Text(_) | Self::Page(_) => None,
        }
    }
}

/// A way that a request may be refused: a status and when.
pub(super) type Refused = (u16, &'static str);

const UNKNOWN: Refused = (404, "There is no model of this name");
const STOPPING: Refused = (503, "The server is about to stop");

/// How requests that are computed for may be refused.
const OF_WORK: [Refused; 7] = [
    (400, "Nothing is asked for"),
    UNKNOWN,
    (413, "The body has more bytes, records or tokens than are allowed"),
    (422, "The body is not understood"),
    (424, "The model is of another kind, or failed"),
    (429, "Too many wait already"),
    (503, "There was no answer in time, or the server is about to stop"),
];

/// One method of one address.
pub(super) struct Endpoint {
    pub path: String,
    pub method: HttpMethod,
    pub handler: MethodRouter<Arc<App>>,
    pub summary: &'static str,
    pub tag: &'static str,
    pub body: Option<Body>,
    pub answers: Answers,
    /// The form of its errors.
    pub manner: Manner,
    pub refused: Vec<Refused>,
    /// Whether it is computed for by a model, from its queue.
    pub computed: bool,
    /// Whether a key is asked for, where the server has one.
    pub keyed: bool,
}

impl Endpoint {
    /// Something to read, for everyone.
    fn get(path: &str, tag: &'static str, handler: MethodRouter<Arc<App>>, answers: Answers) -> Self {
        Self {
            path: path.to_owned(),
            method: HttpMethod::Get,
            handler,
            summary: "",
            tag,
            body: None,
            answers,
            manner: Manner::Tei,
            refused: Vec::new(),
            computed: false,
            keyed: false,
        }
    }

    /// Something to ask, for whoever has the key.
    fn post(
        path: &str,
        tag: &'static str,
        handler: MethodRouter<Arc<App>>,
        body: Body,
        answers: Answers,
    ) -> Self {
        let method = HttpMethod::Post;
        let refused = OF_WORK.to_vec();
        let get = Self::get(path, tag, handler, answers);
        Self { method, body: Some(body), refused, keyed: true, ..get }
    }

    fn says(self, summary: &'static str) -> Self {
        Self { summary, ..self }
    }

    fn manner(self, manner: Manner) -> Self {
        Self { manner, ..self }
    }

    fn keyed(self) -> Self {
        Self { keyed: true, ..self }
    }

    fn computed(self) -> Self {
        Self { computed: true, ..self }
    }

    fn refuses(self, refused: &[Refused]) -> Self {
        Self { refused: refused.to_vec(), ..self }
    }
}

/// Everything that the server has.
fn endpoints() -> Vec<Endpoint> {
    use Answers::{Document, Json, JsonOrBinary, JsonOrEvents, Page, Text};
    const SERVER: &str = "Server";
    const TEI: &str = "text-embeddings-inference";
    const OPENAI: &str = "OpenAI";
    const INFERENCE: &str = "Open Inference Protocol";

    let ready = |path| {
        Endpoint::get(path, SERVER, get(status::ready), Json(of::<Ready>()))
            .says("Whether requests are taken")
            .refuses(&[STOPPING])
    };
    let live =
        |path| Endpoint::get(path, SERVER, get(status::live), Json(of::<Live>())).says("The process answers");
    let mut all = vec![
        Endpoint::get("/", SERVER, get(page::html), Page(page::HTML)).says("A page to try the models"),
        Endpoint::get("/page.js", SERVER, get(page::script), Page(page::SCRIPT)).says("Its script"),
        Endpoint::get("/page.css", SERVER, get(page::style), Page(page::STYLE)).says("Its style"),
        Endpoint::get("/openapi.json", SERVER, get(document), Document).says("This document"),
        ready("/health"),
        ready("/ping"),
        ready("/ready"),
        live("/live"),
        Endpoint::get("/info", SERVER, get(status::info), Json(of::<Info>())).says("The models").keyed(),
        Endpoint::get("/metrics", SERVER, get(status::metrics), Text(status::METRICS_TYPE))
            .says("Counts, as Prometheus reads them")
            .refuses(&[(500, "They can't be written")]),
        Endpoint::get("/v1/models", OPENAI, get(status::models), Json(of::<ListedModels>()))
            .says("The models' names")
            .manner(Manner::OpenAi)
            .keyed(),
        Endpoint::post(
            "/v1/completions",
            OPENAI,
            post(complete),
            of::<CompletionsBody>(),
            JsonOrEvents(of::<Completion>()),
        )
        .says("Texts that go on with prompts")
        .manner(Manner::OpenAi),
        Endpoint::get("/v2", INFERENCE, get(status::server), Json(of::<InferenceServer>()))
            .says("The server"),
        live("/v2/health/live"),
        ready("/v2/health/ready"),
    ];
    for place in ["/v2/models/{model}", "/v2/models/{model}/versions/{version}"] {
        all.extend([
            Endpoint::get(place, INFERENCE, get(status::model), Json(of::<InferenceModel>()))
                .says("What a model takes and gives")
                .manner(Manner::Inference)
                .refuses(&[UNKNOWN, (424, "The model generates texts")])
                .keyed(),
            Endpoint::get(
                &format!("{place}/ready"),
                INFERENCE,
                get(status::model_ready),
                Json(of::<InferenceReady>()),
            )
            .says("Whether a model takes requests")
            .manner(Manner::Inference)
            .refuses(&[UNKNOWN, (424, "The model generates texts"), STOPPING]),
            Endpoint::post(
                &format!("{place}/infer"),
                INFERENCE,
                post(inference::infer),
                of::<InferBody>(),
                JsonOrBinary(of::<Inferred>()),
            )
            .says("Answers to texts; or what the model's graph gives for tokens")
            .manner(Manner::Inference)
            .computed(),
        ]);
    }
    let reloads =
        Endpoint::get("/models/{model}/reload", SERVER, post(reload::reload), Json(of::<ModelInfo>()));
    all.push(Endpoint {
        method: HttpMethod::Post,
        ..reloads.says("Loads a model anew from its directory").keyed().refuses(&[
            (403, "The server has no key"),
            UNKNOWN,
            (424, "It can't be loaded; the old one goes on"),
            STOPPING,
        ])
    });
    let ask = |route: Route, path: &str, handler| {
        let (tag, summary, body, answers) = match route {
            Route::Predict => (
                TEI,
                "Labels of texts, or of pairs",
                of::<routes::Predict>(),
                one_or_all(list(of::<Label>())),
            ),
            Route::Entities => {
                ("tk", "Entities of texts", of::<routes::Texts>(), one_or_all(list(of::<Found>())))
            }
            Route::Answers => {
                ("tk", "Answers to questions", of::<routes::Answers>(), one_or_all(of::<Part>()))
            }
            Route::Fills => {
                ("tk", "Tokens for masks", of::<routes::Texts>(), one_or_all(list(list(of::<Fill>()))))
            }
            Route::Embed => (TEI, "Embeddings of texts", of::<routes::Embed>(), list(list(plain::<f32>()))),
            Route::Similarity => {
                (TEI, "Similarities of texts to one", of::<routes::Similarity>(), list(plain::<f32>()))
            }
            Route::Rerank => (TEI, "Texts from the best", of::<routes::Rerank>(), list(of::<Rank>())),
            Route::RerankCohere => {
                ("Cohere", "Documents from the best", of::<routes::RerankCohere>(), of::<CohereRanks>())
            }
            Route::OpenAiEmbeddings => {
                (OPENAI, "Embeddings of texts", of::<routes::OpenAiEmbeddings>(), of::<Embeddings>())
            }
        };
        Endpoint::post(path, tag, handler, body, Json(answers))
            .says(summary)
            .manner(route.manner())
            .computed()
    };
    for (route, paths) in Route::ALL {
        for &path in paths {
            all.push(ask(route, path, asked(route, path)));
            if !path.starts_with("/v") {
                all.push(ask(route, &format!("/models/{{model}}{path}"), asked(route, path)));
            }
        }
    }
    for place in ["", "/models/{model}"] {
        let refused: Vec<Refused> =
            OF_WORK.into_iter().filter(|(status, _)| ![400, 429].contains(status)).collect();
        all.extend([
            Endpoint::post(
                &format!("{place}/tokenize"),
                TEI,
                of_tokens("/tokenize", tokens::tokenize),
                of::<Tokenize>(),
                Json(list(list(of::<Token>()))),
            )
            .says("Tokens of texts, with their places")
            .refuses(&refused),
            Endpoint::post(
                &format!("{place}/decode"),
                TEI,
                of_tokens("/decode", tokens::decode),
                of::<Decode>(),
                Json(list(plain::<String>())),
            )
            .says("Texts of tokens")
            .refuses(&refused),
        ]);
    }
    all
}

/// The router of all of it.
pub(super) fn router(app: Arc<App>) -> Router {
    let router = endpoints()
        .into_iter()
        .fold(Router::new(), |router, Endpoint { path, handler, .. }| router.route(&path, handler));
    router.fallback(status::nothing).method_not_allowed_fallback(status::other_method).with_state(app)
}

/// The document, for programs that make clients of it.
async fn document(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], app.document.clone()).into_response()
}

/// The OpenAPI document, of a server that asks for a key or does not.
///
/// # Errors
/// It can't be written.
pub(super) fn openapi(keyed: bool) -> serde_json::Result<String> {
    openapi::document(endpoints(), keyed)
}
