//! OpenAI's `/v1/completions`: prompts → texts, whole or as they come.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Map, Value, json};

use super::generator::{Generator, TextNews, Texts};
use super::refusal::Refusal;
use crate::generate::{Finish, Generated, GenerationConfig};

/// What a body asks for.
pub struct Completions {
    pub model: Option<String>,
    prompts: Vec<String>,
    settings: GenerationConfig,
    stream: bool,
    echo: bool,
    /// Whether the last event of a stream tells how many tokens there were.
    usage: bool,
}

/// The most prompts of a request.
const MOST_PROMPTS: usize = 128;

/// Fields that ask for what there is not, unless they ask for nothing.
const LACKING: [&str; 6] =
    ["logprobs", "suffix", "best_of", "logit_bias", "presence_penalty", "frequency_penalty"];

/// Whether a field asks for nothing: null, 0, an empty object; the best of one.
fn asks_nothing(name: &str, value: &Value) -> bool {
    let one = name == "best_of" && value.as_u64() == Some(1);
    one || value.is_null() || value.as_f64() == Some(0.0) || value.as_object().is_some_and(Map::is_empty)
}

impl Completions {
    /// Reads a body.
    ///
    /// # Errors
    /// It is no object, lacks a prompt, or asks for what there is not.
    pub fn read(body: &[u8]) -> Result<Self, Refusal> {
        let mut fields: Map<String, Value> =
            serde_json::from_slice(body).map_err(|error| Refusal::invalid(error.to_string()))?;
        for name in LACKING {
            if let Some(value) = fields.get(name).filter(|value| !asks_nothing(name, value)) {
                return Err(Refusal::invalid(format!(
                    "{name} is {value}, and there is none here: leave it out"
                )));
            }
        }
        let prompts = match fields.remove("prompt") {
            Some(Value::String(prompt)) => vec![prompt],
            Some(Value::Array(prompts)) => prompts
                .into_iter()
                .map(|prompt| match prompt {
                    Value::String(prompt) => Ok(prompt),
                    other => Err(Refusal::invalid(format!("prompt: {other}, expected texts"))),
                })
                .collect::<Result<_, _>>()?,
            Some(other) => {
                return Err(Refusal::invalid(format!("prompt: {other}, expected a text or texts")));
            }
            None => return Err(Refusal::invalid("there is no \"prompt\"")),
        };
        if prompts.is_empty() {
            return Err(Refusal::empty("there is no prompt in it"));
        }
        if prompts.len() > MOST_PROMPTS {
            return Err(Refusal::too_large(format!(
                "{} prompts, expected {MOST_PROMPTS} at most",
                prompts.len()
            )));
        }
        let flag = |fields: &Map<String, Value>, name: &str| match fields.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(is)) => Ok(*is),
            Some(other) => Err(Refusal::invalid(format!("{name}: {other}, expected true or false"))),
        };
        let (stream, echo) = (flag(&fields, "stream")?, flag(&fields, "echo")?);
        let usage = match fields.get("stream_options") {
            Some(Value::Object(options)) => flag(options, "include_usage")?,
            _ => false,
        };
        let model = fields.get("model").and_then(Value::as_str).map(str::to_owned);
        Ok(Self { model, settings: settings(fields)?, prompts, stream, echo, usage })
    }

    /// Answers by a model.
    ///
    /// # Errors
    /// A prompt is too long, there is no room, or the model fails.
    pub async fn answer(self, generator: &Generator) -> Result<Response, Refusal> {
        let Self { prompts, settings, stream, echo, usage, .. } = self;
        let mut all = Vec::with_capacity(prompts.len());
        for (i, prompt) in prompts.into_iter().enumerate() {
            // each draws numbers of its own
            let settings = GenerationConfig { record: i as u64, ..settings.clone() };
            let request = generator.prompt(&prompt, settings);
            let request = request.map_err(|error| Refusal::invalid(format!("prompt {i}: {error:#}")))?;
            all.push((prompt, request));
        }
        let texts = all.into_iter().map(|(prompt, request)| Ok((prompt, generator.submit(request)?)));
        let texts = texts.collect::<Result<Vec<(String, Texts)>, Refusal>>()?;
        let about = About::new(&generator.name);
        let of_each = settings.num_return_sequences;
        if stream {
            return Ok(streamed(about, texts, of_each, echo, usage));
        }
        let (mut choices, mut tokens) = (Vec::new(), Usage::default());
        for (i, (prompt, mut texts)) in texts.into_iter().enumerate() {
            tokens.prompt += texts.prompt_tokens;
            while let Some(news) = texts.news.recv().await {
                match news {
                    TextNews::Failed(why) => return Err(Refusal::backend(format!("prompt {i}: {why}"))),
                    TextNews::Text { finished: None, .. } => {}
                    TextNews::Text { sequence, finished: Some(Generated { text, ids, finish }), .. } => {
                        tokens.completion += ids.len();
                        let text = if echo { format!("{prompt}{text}") } else { text };
                        choices.push(choice(i * of_each + sequence, &text, Some(finish)));
                    }
                }
            }
        }
        choices.sort_by_key(|choice| choice["index"].as_u64());
        Ok(axum::Json(about.body(choices, Some(tokens))).into_response())
    }
}

/// The settings that OpenAI's fields stand for, with those of tk by their own names.
fn settings(mut fields: Map<String, Value>) -> Result<GenerationConfig, Refusal> {
    for (theirs, ours) in [("max_tokens", "max_new_tokens"), ("n", "num_return_sequences")] {
        if let Some(value) = fields.remove(theirs) {
            fields.insert(ours.to_owned(), value);
        }
    }
    fields.retain(|_, value| !value.is_null());
    fields.entry("temperature").or_insert(json!(1));
    if fields["temperature"].as_f64() == Some(0.0) {
        // nothing is drawn, so there is nothing to choose from
        fields.retain(|name, _| !["top_p", "top_k", "min_p"].contains(&name.as_str()));
    }
    if fields.contains_key("num_beams") {
        fields.insert("temperature".to_owned(), json!(0));
    }
    static DRAWN: AtomicU64 = AtomicU64::new(0);
    let seed = || {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        (now.as_nanos() as u64) ^ DRAWN.fetch_add(1, Ordering::Relaxed).rotate_left(40)
    };
    let base = GenerationConfig { max_new_tokens: 16, seed: seed(), ..GenerationConfig::default() };
    base.with(&fields).map_err(|error| Refusal::invalid(format!("{error:#}")))
}

#[derive(Clone, Copy, Default)]
struct Usage {
    prompt: usize,
    completion: usize,
}

/// What all parts of an answer say.
#[derive(Clone)]
struct About {
    id: String,
    created: u64,
    model: Arc<str>,
}

impl About {
    fn new(model: &str) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self {
            id: format!("cmpl-{:x}-{created:x}-{number}", std::process::id()),
            created,
            model: model.into(),
        }
    }

    fn body(&self, choices: Vec<Value>, usage: Option<Usage>) -> Value {
        let mut body = json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": &*self.model,
            "choices": choices,
        });
        if let Some(Usage { prompt, completion }) = usage {
            body["usage"] = json!({
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            });
        }
        body
    }
}

fn choice(index: usize, text: &str, finish: Option<Finish>) -> Value {
    json!({"index": index, "text": text, "logprobs": null, "finish_reason": finish.map(Finish::name)})
}

/// The texts as server-sent events, of all prompts as they come.
fn streamed(about: About, texts: Vec<(String, Texts)>, of_each: usize, echo: bool, usage: bool) -> Response {
    struct State {
        about: About,
        texts: Vec<Option<Texts>>,
        /// What is to be told before all else.
        first: Vec<Value>,
        tokens: Usage,
        of_each: usize,
        usage: bool,
        over: bool,
    }
    let mut first = Vec::new();
    if echo {
        for (i, (prompt, _)) in texts.iter().enumerate() {
            first.extend((0..of_each).map(|sequence| choice(i * of_each + sequence, prompt, None)));
        }
        first.reverse();
    }
    let tokens = Usage { prompt: texts.iter().map(|(_, texts)| texts.prompt_tokens).sum(), completion: 0 };
    let texts = texts.into_iter().map(|(_, texts)| Some(texts)).collect();
    let state = State { about, texts, first, tokens, of_each, usage, over: false };
    let data = |value: &Value| Event::default().data(value.to_string());
    let next = move |mut state: State| async move {
        if state.over {
            return None;
        }
        if let Some(choice) = state.first.pop() {
            let event = data(&state.about.body(vec![choice], None));
            return Some((Ok::<_, Infallible>(event), state));
        }
        loop {
            let next = futures_util::future::poll_fn(|context| {
                let mut left = false;
                for (i, texts) in state.texts.iter_mut().enumerate() {
                    let Some(under_way) = texts else { continue };
                    match under_way.news.poll_recv(context) {
                        std::task::Poll::Ready(Some(news)) => return std::task::Poll::Ready(Some((i, news))),
                        std::task::Poll::Ready(None) => *texts = None,
                        std::task::Poll::Pending => left = true,
                    }
                }
                if left { std::task::Poll::Pending } else { std::task::Poll::Ready(None) }
            });
            let event = match next.await {
                Some((i, TextNews::Text { sequence, text, finished })) => {
                    let finish = finished.map(|generated| {
                        state.tokens.completion += generated.ids.len();
                        generated.finish
                    });
                    if text.is_empty() && finish.is_none() {
                        continue;
                    }
                    let choice = choice(i * state.of_each + sequence, &text, finish);
                    data(&state.about.body(vec![choice], None))
                }
                Some((i, TextNews::Failed(why))) => {
                    state.texts.clear();
                    state.usage = false;
                    data(&json!({"error": {"message": format!("prompt {i}: {why}"), "type": "server_error"}}))
                }
                None if state.usage => {
                    state.usage = false;
                    data(&state.about.body(Vec::new(), Some(state.tokens)))
                }
                None => {
                    state.over = true;
                    Event::default().data("[DONE]")
                }
            };
            return Some((Ok(event), state));
        }
    };
    Sse::new(stream::unfold(state, next)).keep_alive(KeepAlive::default()).into_response()
}
