//! Models that are replaced while they answer: the new one is loaded and has answered before it takes the old one's place.
//! What the old one was asked before is answered by it; it ends once nobody waits for it any more.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock};

use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};

use super::answers::ModelInfo;
use super::log::Work;
use super::queue::Refused;
use super::refusal::{Manner, Refusal};
use super::status::ModelName;
use super::{App, Generator, Served};
use crate::Result;
use crate::data::tokens::Tokenizer;

/// A model that answers records, or one that generates texts.
#[derive(Clone)]
pub enum Model {
    Answers(Arc<Served>),
    Generates(Arc<Generator>),
}

/// Loads the model that requests call so, from its directory, and lets it answer once.
pub type Load = Box<dyn Fn(&str) -> Result<Model> + Send + Sync>;

impl Model {
    pub fn name(&self) -> &str {
        match self {
            Self::Answers(model) => &model.name,
            Self::Generates(model) => &model.name,
        }
    }

    pub(super) fn about(&self) -> &ModelInfo {
        match self {
            Self::Answers(model) => &model.about,
            Self::Generates(model) => &model.about,
        }
    }

    pub(super) fn tokenizer(&self) -> &Tokenizer {
        match self {
            Self::Answers(model) => &model.tokenizer,
            Self::Generates(model) => &model.tokenizer,
        }
    }

    /// How many records wait, or how many prompts are under way.
    pub(super) fn waiting(&self) -> usize {
        match self {
            Self::Answers(model) => model.queue.len(),
            Self::Generates(model) => model.under_way(),
        }
    }

    pub(super) fn stop(&self) {
        match self {
            Self::Answers(model) => model.stop(),
            Self::Generates(model) => model.stop(),
        }
    }
}

/// A model's place, where another one may come.
pub(super) struct Current {
    pub name: String,
    now: RwLock<Model>,
}

impl Current {
    pub fn new(model: Model) -> Self {
        Self { name: model.name().to_owned(), now: RwLock::new(model) }
    }

    /// The model that answers now. It answers as long as somebody holds it.
    pub fn get(&self) -> Model {
        self.now.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace(&self, model: Model) -> Model {
        std::mem::replace(&mut *self.now.write().unwrap_or_else(PoisonError::into_inner), model)
    }
}

impl App {
    /// Loads a model anew from its directory. It takes as long as it takes, and as much memory as both.
    ///
    /// # Errors
    /// There is no such model, or it can't be loaded: the old one stays.
    fn reload_now(&self, name: &str) -> Result<ModelInfo, Refusal> {
        let current = self.models.iter().find(|current| current.name == name);
        let current = current.ok_or_else(|| self.no_model(name))?;
        // one after another, so that no more than one model is there twice
        let _turn = self.reloading.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.ready.load(Ordering::Relaxed) {
            return Err(Refused::Closed.into());
        }
        let loaded = catch_unwind(AssertUnwindSafe(|| (self.load)(name)));
        let loaded =
            loaded.unwrap_or_else(|panic| Err(crate::error::of_panic("loading a model", panic.as_ref())));
        match loaded {
            Ok(model) => {
                let about = model.about().clone();
                drop(current.replace(model));
                let sha = about.model_sha.as_deref().unwrap_or("not known");
                self.say.line(format!("{name} is loaded anew; its weights' SHA-256 is {sha}"));
                Ok(about)
            }
            Err(error) => {
                self.say.warn(format!("{name} is not loaded anew, the old model goes on: {error:#}"));
                Err(Refusal::backend(format!(
                    "the old model goes on, since the new one can't be loaded: {error:#}"
                )))
            }
        }
    }

    /// Loads all models anew, one after another; what fails is told.
    pub(super) fn reload_all(&self) {
        for current in &self.models {
            // what it says is told by then
            let _ = self.reload_now(&current.name);
        }
    }
}

/// Loads a model anew, for whoever has the key.
///
/// A server without a key refuses it, also on loopback: a load takes a processor and the memory of a second model, a page
/// that a browser has open may post to 127.0.0.1 without asking, and behind a proxy everyone comes from there. Who may send
/// the process a SIGHUP needs no key.
pub(super) async fn reload(
    State(app): State<Arc<App>>,
    ModelName(name): ModelName,
    request: Request,
) -> Response {
    let heard = app.heard(&request, "/reload", Manner::Tei);
    let allowed = app.check_key(request.headers());
    let reloaded = async {
        allowed?;
        if app.key.is_none() {
            return Err(Refusal::forbidden(
                "this server has no --api-key-file, and without a key nobody may reload a model by HTTP: send the process a SIGHUP",
            ));
        }
        let (app, name) = (app.clone(), name.unwrap_or_default());
        // it goes on where the client goes
        let work = tokio::task::spawn_blocking(move || app.reload_now(&name));
        let about = work.await.map_err(|error| Refusal::backend(error.to_string()))??;
        let work = Work { model: about.model_id.clone(), ..Work::default() };
        Ok(work.of(axum::Json(about).into_response()))
    };
    let reloaded = reloaded.await;
    app.finished(&heard, reloaded)
}
