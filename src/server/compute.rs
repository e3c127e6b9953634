//! What a request asks of a model → the model's queue → what it is told, with the time that it took.

use std::time::{Duration, Instant};

use axum::response::{IntoResponse, Response};

use super::log::Work;
use super::queue::Reply;
use super::refusal::Refusal;
use super::routes::{Asks, Record, Route};
use super::served::{Ask, Told};
use super::{App, SMALL_BODY, Served, put};

/// What a model has told, in the order in which it was asked.
pub(super) struct Computed {
    pub told: Vec<Told>,
    /// How many were asked, and tokens of all of them.
    count: usize,
    pub tokens: usize,
    /// The longest of all that were asked.
    queued: Duration,
    computed: Duration,
}

/// Reads something, or writes it: in a thread that may take its time where it is many bytes.
pub(super) fn at_leisure<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes <= SMALL_BODY { work() } else { tokio::task::block_in_place(work) }
}

impl App {
    /// Answers records as a route's clients ask for them.
    pub(super) async fn answer(
        &self,
        route: Route,
        model: Option<String>,
        body: &[u8],
    ) -> Result<Response, Refusal> {
        let Asks { records, truncate, model: named, form } = route.read(body)?;
        let model = self.model(model.or(named).as_deref())?;
        if let Some(field) = route.field().filter(|field| !model.task.fields_answered().contains(field)) {
            return Err(Refusal::backend(format!(
                "{} is a {} model: its answers have no \"{field}\"",
                model.name,
                model.task.name()
            )));
        }
        let started = Instant::now();
        let asked = at_leisure(body.len(), || self.read(&model, records, truncate))?;
        let tokenized = started.elapsed();
        let mut computed = self.compute(&model, asked).await?;
        let body = form.body(computed.answers()?, &model.name, computed.tokens)?;
        Ok(computed.with_headers(&model, tokenized, axum::Json(body).into_response()))
    }

    /// Refuses more records, or rows, than a request may have.
    pub(super) fn check_count(&self, count: usize, of: &str) -> Result<(), Refusal> {
        match count > self.limits.records {
            true => Err(Refusal::too_large(format!(
                "{count} {of} in one request, and {} are allowed",
                self.limits.records
            ))),
            false => Ok(()),
        }
    }

    /// Refuses more tokens than a request may have.
    pub(super) fn check_tokens(&self, tokens: usize) -> Result<(), Refusal> {
        match tokens > self.limits.tokens {
            true => {
                Err(Refusal::too_large(format!("the request has more than {} tokens", self.limits.tokens)))
            }
            false => Ok(()),
        }
    }

    /// What the records ask.
    pub(super) fn read(
        &self,
        model: &Served,
        records: Vec<Record>,
        truncate: bool,
    ) -> Result<Vec<Ask>, Refusal> {
        self.check_count(records.len(), "records")?;
        let mut tokens = 0;
        let mut all = Vec::with_capacity(records.len());
        for (i, record) in records.into_iter().enumerate() {
            let asked = model.asked(record).map_err(|bad| Refusal::invalid(format!("record {i}: {bad}")))?;
            if asked.truncated() && !truncate {
                return Err(Refusal::invalid(format!(
                    "record {i} is longer than the {} tokens that the model takes, and \"truncate\" is false",
                    model.max_length
                )));
            }
            tokens += asked.tokens();
            self.check_tokens(tokens)?;
            all.push(Ask::Record(asked));
        }
        Ok(all)
    }

    /// Asks a model, and waits until all is told.
    pub(super) async fn compute(&self, model: &Served, asked: Vec<Ask>) -> Result<Computed, Refusal> {
        let (count, tokens) = (asked.len(), asked.iter().map(Ask::tokens).sum());
        let receivers = model.queue.submit(asked)?;
        let mut replies = Vec::with_capacity(receivers.len());
        for receiver in receivers {
            replies.push(receiver.await.map_err(|_| Refusal::backend("the model broke down"))?);
        }
        let slowest = |of: fn(&Reply) -> Duration| replies.iter().map(of).max().unwrap_or_default();
        let (queued, computed) = (slowest(|reply| reply.queued), slowest(|reply| reply.computed));
        let told = replies.into_iter().map(|reply| reply.told.map_err(Refusal::backend));
        Ok(Computed { told: told.collect::<Result<_, _>>()?, count, tokens, queued, computed })
    }
}

impl Computed {
    /// The answers, where records were asked.
    pub(super) fn answers(&mut self) -> Result<Vec<Record>, Refusal> {
        let answer = |(i, told)| match told {
            Told::Answer(answer) => answer.map_err(|bad| Refusal::backend(format!("record {i}: {bad}"))),
            Told::Outputs(_) => Err(Refusal::backend(format!("record {i}: the model gave no answer"))),
        };
        std::mem::take(&mut self.told).into_iter().enumerate().map(answer).collect()
    }

    /// The response with what is told of the work.
    pub(super) fn with_headers(
        &self,
        model: &Served,
        tokenized: Duration,
        mut response: Response,
    ) -> Response {
        let headers = response.headers_mut();
        put(headers, "x-compute-type", model.provider.name());
        put(headers, "x-compute-tokens", &self.tokens.to_string());
        for (name, time) in [
            ("x-tokenization-time", tokenized),
            ("x-queue-time", self.queued),
            ("x-inference-time", self.computed),
        ] {
            put(headers, name, &time.as_millis().to_string());
        }
        let (texts, tokens) = (Some(self.count), Some(self.tokens));
        Work { model: model.name.clone(), texts, tokens }.of(response)
    }
}
