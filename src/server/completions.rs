//! OpenAI's `/v1/completions`: prompts → texts, whole or as they come.

use std::convert::Infallible;
use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::ToSchema;

use super::generator::{Generator, TextNews, Texts};
use super::log::Work;
use super::refusal::{Manner, Refusal};
use super::routes::{OneOrMany, parsed};
use crate::data::tokens::Tokenizer;
use crate::generate::text::TextStream;
use crate::generate::{Finish, Generated, GenerationConfig, TokenLogprobs};
use crate::task::scores::short;

/// What a body asks for.
pub struct Completions {
    pub model: Option<String>,
    prompts: Vec<String>,
    settings: GenerationConfig,
    stream: bool,
    echo: bool,
    /// Whether nothing is to follow: the prompts are scored.
    scores: bool,
    /// Whether the last event of a stream tells how many tokens there were.
    usage: bool,
}

/// Prompts, and how they are gone on with.
#[derive(Deserialize, ToSchema)]
pub struct CompletionsBody {
    /// A prompt, or several.
    prompt: OneOrMany<String>,
    /// The language model, where there are several.
    model: Option<String>,
    /// Whether the texts are sent as they come, as server-sent events.
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    /// Whether the prompt stands in front of its text; with `logprobs` its tokens are scored, too.
    echo: Option<bool>,
    /// Whether the log-probabilities of the tokens are told, and those of how many of the likeliest at their places.
    #[schema(minimum = 0, maximum = 5)]
    logprobs: Option<usize>,
    #[serde(flatten)]
    #[schema(value_type = CompletionSettings)]
    settings: Map<String, Value>,
}

#[derive(Deserialize, ToSchema)]
struct StreamOptions {
    /// Whether the last event tells how many tokens there were.
    include_usage: Option<bool>,
}

/// What decides which tokens follow; see `tk generate --help`.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes what GenerationConfig::with reads")]
struct CompletionSettings {
    /// Tokens that may follow a prompt; 16 where it isn't said. 0, with `echo`: the prompts alone are scored.
    #[schema(minimum = 0)]
    max_tokens: Option<usize>,
    /// What scores are divided by before a token is drawn; 1 where it isn't said. 0: the best token is taken.
    #[schema(minimum = 0)]
    temperature: Option<f32>,
    #[schema(exclusive_minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    #[schema(minimum = 0)]
    top_k: Option<usize>,
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    #[schema(exclusive_minimum = 0)]
    repetition_penalty: Option<f32>,
    /// Above 1: a beam search, which draws nothing.
    #[schema(minimum = 1, maximum = 4096)]
    num_beams: Option<usize>,
    length_penalty: Option<f32>,
    /// Texts for a prompt.
    #[schema(minimum = 1, maximum = 4096)]
    n: Option<usize>,
    /// Texts that end one, and are not part of it.
    stop: Option<OneOrMany<String>>,
    /// Requests with one seed draw the same.
    seed: Option<u64>,
}

/// Texts that go on with prompts.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Completion {
    id: String,
    /// `text_completion`
    object: &'static str,
    created: u64,
    model: String,
    choices: Vec<Choice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    usage: Option<CompletionUsage>,
}

/// One of the texts, or of a stream the next part of one.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Choice {
    /// Which of them; those of the first prompt come first.
    index: usize,
    text: String,
    logprobs: Option<Logprobs>,
    /// `stop` or `length`, where it is over.
    finish_reason: Option<&'static str>,
}

/// Log-probabilities under the model, before a temperature or a penalty.
#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Logprobs {
    /// Each token's own text; a part of a character is U+FFFD.
    tokens: Vec<String>,
    /// None of a prompt's first token, in front of which nothing stands.
    token_logprobs: Vec<Option<f32>>,
    /// The likeliest tokens at each place, and the one that stands there.
    #[schema(value_type = Vec<Option<HashMap<String, f32>>>)]
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where each begins in `text`, in characters.
    text_offset: Vec<usize>,
}

impl Logprobs {
    /// Of the tokens of a text; those that stand behind it, in a stop text, are not told.
    fn of(told: &[TokenLogprobs], text: &str, tokenizer: &Tokenizer) -> Result<Self, Refusal> {
        let failed = |error: &dyn Display| Refusal::backend(format!("the text of a token: {error}"));
        let inner = tokenizer.inner();
        let name = |id: u32| inner.decode(&[id], false).map_err(|error| failed(&error));
        let mut stream = TextStream::new(inner, &[]).map_err(|error| failed(&error))?;
        let special = inner.get_added_vocabulary();
        let (mut rest, mut offset) = (text, 0);
        let (mut tokens, mut token_logprobs) = (Vec::new(), Vec::new());
        let (mut top_logprobs, mut text_offset) = (Vec::new(), Vec::new());
        for TokenLogprobs { id, logprob, top } in told {
            let token = name(*id)?;
            let piece = stream.push(*id).text;
            // a special token is no text, but where it is written in a prompt
            let piece =
                if special.is_special_token(&token) && rest.starts_with(&token) { &token } else { &piece };
            if rest.is_empty() && !piece.is_empty() {
                break;
            }
            let begins = offset;
            offset += piece.chars().count();
            rest = rest.get(piece.len()..).unwrap_or_default();
            let mut best = Map::new();
            for &(id, log) in top.iter().chain(logprob.map(|log| (*id, log)).iter()) {
                best.entry(name(id)?).or_insert(short(log));
            }
            tokens.push(token);
            token_logprobs.push(*logprob);
            top_logprobs.push(logprob.map(|_| best));
            text_offset.push(begins);
        }
        Ok(Self { tokens, token_logprobs, top_logprobs, text_offset })
    }
}

#[derive(Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CompletionUsage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

/// The most prompts of a request.
const MOST_PROMPTS: usize = 128;

/// Fields that ask for what there is not, unless they ask for nothing.
const LACKING: [&str; 5] = ["suffix", "best_of", "logit_bias", "presence_penalty", "frequency_penalty"];

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
        let CompletionsBody { prompt, model, stream, stream_options, echo, logprobs, mut settings } =
            parsed(body)?;
        for name in LACKING {
            if let Some(value) = settings.get(name).filter(|value| !asks_nothing(name, value)) {
                return Err(Refusal::invalid(format!(
                    "{name} is {value}, and there is none here: leave it out"
                )));
            }
        }
        let (_, prompts) = prompt.split();
        if prompts.is_empty() {
            return Err(Refusal::empty("there is no prompt in it"));
        }
        if prompts.len() > MOST_PROMPTS {
            return Err(Refusal::too_large(format!(
                "{} prompts, expected {MOST_PROMPTS} at most",
                prompts.len()
            )));
        }
        let usage = stream_options.and_then(|options| options.include_usage).unwrap_or(false);
        let (stream, echo) = (stream.unwrap_or(false), echo.unwrap_or(false));
        let scores = settings.get("max_tokens").and_then(Value::as_u64) == Some(0);
        if scores && !echo {
            return Err(Refusal::invalid(
                "max_tokens is 0, expected 1 or more; or 0 with \"echo\" and \"logprobs\", which scores the prompt",
            ));
        }
        if stream && (scores || logprobs.is_some()) {
            return Err(Refusal::invalid(
                "logprobs are told of whole texts, and not with \"stream\": leave one of them out",
            ));
        }
        if scores {
            // the engine's least: it comes with the prompt's last scores, and is not told
            settings.insert("max_tokens".to_owned(), json!(1));
        }
        let mut settings = generation(settings)?;
        (settings.logprobs, settings.prompt_logprobs) = (logprobs, echo && logprobs.is_some());
        settings.check().map_err(|error| Refusal::invalid(format!("{error:#}")))?;
        Ok(Self { model, settings, prompts, stream, echo, scores, usage })
    }

    /// Answers by a model.
    ///
    /// # Errors
    /// A prompt is too long, there is no room, or the model fails.
    pub async fn answer(self, generator: &Generator) -> Result<Response, Refusal> {
        let Self { prompts, settings, stream, echo, scores, usage, .. } = self;
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
        let work = Work { model: generator.name.clone(), texts: Some(texts.len()), tokens: None };
        if stream {
            return Ok(work.of(streamed(about, texts, of_each, echo, usage)));
        }
        let (mut choices, mut tokens) = (Vec::new(), Usage::default());
        for (i, (prompt, mut texts)) in texts.into_iter().enumerate() {
            tokens.prompt += texts.prompt_tokens;
            while let Some(news) = texts.news.recv().await {
                match news {
                    TextNews::Failed(why) => return Err(Refusal::backend(format!("prompt {i}: {why}"))),
                    TextNews::Text { finished: None, .. } => {}
                    TextNews::Text { sequence, finished: Some(generated), .. } => {
                        let Generated { text, ids, finish, mut logprobs } = generated;
                        let (text, finish) = match scores {
                            true => (prompt.clone(), Finish::Length),
                            false if echo => (format!("{prompt}{text}"), finish),
                            false => (text, finish),
                        };
                        if scores {
                            logprobs.truncate(texts.prompt_tokens);
                        } else {
                            tokens.completion += ids.len();
                        }
                        let told =
                            settings.logprobs.map(|_| Logprobs::of(&logprobs, &text, &generator.tokenizer));
                        let logprobs = told.transpose()?;
                        let choice = choice(i * of_each + sequence, text, Some(finish));
                        choices.push(Choice { logprobs, ..choice });
                    }
                }
            }
        }
        choices.sort_by_key(|choice: &Choice| choice.index);
        let work = Work { tokens: Some(tokens.prompt + tokens.completion), ..work };
        Ok(work.of(axum::Json(about.body(choices, Some(tokens))).into_response()))
    }
}

/// The settings that OpenAI's fields stand for, with those of tk by their own names.
fn generation(mut fields: Map<String, Value>) -> Result<GenerationConfig, Refusal> {
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

    fn body(&self, choices: Vec<Choice>, usage: Option<Usage>) -> Completion {
        let usage = usage.map(|Usage { prompt, completion }| CompletionUsage {
            prompt_tokens: prompt,
            completion_tokens: completion,
            total_tokens: prompt + completion,
        });
        let (id, model) = (self.id.clone(), self.model.to_string());
        Completion { id, object: "text_completion", created: self.created, model, choices, usage }
    }
}

fn choice(index: usize, text: String, finish: Option<Finish>) -> Choice {
    Choice { index, text, logprobs: None, finish_reason: finish.map(Finish::name) }
}

/// The texts as server-sent events, of all prompts as they come.
fn streamed(about: About, texts: Vec<(String, Texts)>, of_each: usize, echo: bool, usage: bool) -> Response {
    struct State {
        about: About,
        texts: Vec<Option<Texts>>,
        /// What is to be told before all else.
        first: Vec<Choice>,
        tokens: Usage,
        of_each: usize,
        usage: bool,
        over: bool,
    }
    let mut first = Vec::new();
    if echo {
        for (i, (prompt, _)) in texts.iter().enumerate() {
            first.extend((0..of_each).map(|sequence| choice(i * of_each + sequence, prompt.clone(), None)));
        }
        first.reverse();
    }
    let tokens = Usage { prompt: texts.iter().map(|(_, texts)| texts.prompt_tokens).sum(), completion: 0 };
    let texts = texts.into_iter().map(|(_, texts)| Some(texts)).collect();
    let state = State { about, texts, first, tokens, of_each, usage, over: false };
    let event = |body: Completion| Event::default().data(json!(body).to_string());
    let next = move |mut state: State| async move {
        if state.over {
            return None;
        }
        if let Some(choice) = state.first.pop() {
            let event = event(state.about.body(vec![choice], None));
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
                    let choice = choice(i * state.of_each + sequence, text, finish);
                    event(state.about.body(vec![choice], None))
                }
                Some((i, TextNews::Failed(why))) => {
                    state.texts.clear();
                    state.usage = false;
                    let error = Refusal::failed(format!("prompt {i}: {why}")).body(Manner::OpenAi);
                    Event::default().data(error.to_string())
                }
                None if state.usage => {
                    state.usage = false;
                    event(state.about.body(Vec::new(), Some(state.tokens)))
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
