//! Causal language modelling: every token of a text from those before it.

use serde_json::{Value, json};

use super::{Dim, Example, Form, Metrics, Output, Target};
use crate::data::batch::Encoding;
use crate::data::tokens::{Body, Tokenizer};
use crate::model::ops::{Ops, Pick};
use crate::model::token_ids::{self, GPT2_END};
use crate::model::{Family, Head, ModelConfig, manifest};
use crate::{Result, bail_unusable};

/// The key of config.json that is false where a model was fine-tuned without seeing how texts begin.
const FIRST_TOKENS: &str = "first_tokens_learnt";

/// A model of the next token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CausalLm {
    /// V, the scores of a token.
    pub vocabulary: usize,
    /// The tokens that end a text: `eos_token_id` of config.json, which may be a list. Training puts the first behind
    /// every text. Empty where it is `null`: then nothing ends a text.
    pub ends: Vec<u32>,
    /// What stands in front of a text that nothing else stands in front of: `bos_token_id`, or the first of `ends`.
    pub start: Option<u32>,
    /// Whether it has learnt what a text begins with, so that an empty prompt can be gone on with.
    pub begins: bool,
}

/// What is measured, beside the loss.
pub(super) const METRICS: &[&str] = &["bits_per_byte", "perplexity"];

/// Which of an example's tokens are learnt to be predicted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Next {
    /// (T). The first token is never predicted: nothing stands before it.
    pub predicted: Vec<bool>,
    /// The bytes of text that the predicted tokens stand for.
    pub bytes: usize,
}

impl Next {
    /// How many tokens are predicted.
    pub fn count(&self) -> usize {
        self.predicted.iter().filter(|&&predicted| predicted).count()
    }
}

/// How documents become examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cutting {
    /// A long text is cut into parts, each of which begins with the last token of the one before it: so every token
    /// but the first of a text is predicted once. Of a prompt that is too long for its completion the front is left
    /// out, and a completion that is too long alone is cut.
    Training,
    /// The same, and a completion that is too long is cut into such parts too: nothing goes unmeasured.
    Evaluation,
    /// Documents one after another, cut wherever `max_length` falls.
    Concatenated,
}

/// A document's tokens, or those of several, before they are cut.
#[derive(Default)]
struct Whole {
    /// (T)
    ids: Vec<u32>,
    /// (T): the bytes of text that each stands for.
    bytes: Vec<usize>,
    /// (T)
    predicted: Vec<bool>,
    /// The first one that is predicted.
    first: usize,
    /// How many in front stay where the front is cut: those that the tokenizer puts there, or the start.
    kept: usize,
    prompted: bool,
    /// It has no token of a text.
    empty: bool,
}

impl Whole {
    fn extend(&mut self, ids: &[u32], bytes: Option<&[usize]>) {
        self.ids.extend(ids);
        match bytes {
            Some(bytes) => self.bytes.extend(bytes),
            None => self.bytes.resize(self.ids.len(), 0),
        }
    }

    /// Leaves out so many tokens of the prompt's front; true, for something is lost.
    fn forget(&mut self, count: usize) -> bool {
        let range = self.kept..self.kept + count;
        self.ids.drain(range.clone());
        self.bytes.drain(range.clone());
        self.predicted.drain(range);
        self.first -= count;
        true
    }

    fn truncate(&mut self, length: usize) {
        self.ids.truncate(length);
        self.bytes.truncate(length);
        self.predicted.truncate(length);
    }

    /// Cuts it into examples that overlap by one token, less those that have nothing to predict.
    fn cut(&self, max_length: usize, truncated: bool, examples: &mut Vec<Example>) {
        let before = examples.len();
        for start in (0..self.ids.len().saturating_sub(1)).step_by(max_length - 1) {
            let part = start..self.ids.len().min(start.saturating_add(max_length));
            let mut predicted = self.predicted[part.clone()].to_vec();
            predicted[0] = false; // nothing stands before it
            if !predicted.contains(&true) {
                continue;
            }
            let of_predicted = self.bytes[part.clone()].iter().zip(&predicted);
            let bytes = of_predicted.map(|(&bytes, &predicted)| if predicted { bytes } else { 0 }).sum();
            let truncated = truncated && examples.len() == before;
            let (ids, type_ids) = (self.ids[part.clone()].to_vec(), vec![0; part.len()]);
            examples.push(Example {
                encoding: Encoding { ids, type_ids, truncated },
                target: Target::Next(Next { predicted, bytes }),
            });
        }
    }
}

/// What is learnt from: a text, or what follows a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// The line of the file.
    pub line: usize,
    pub prompt: Option<String>,
    pub text: String,
}

impl Document {
    /// Texts without prompts.
    pub fn of_texts<'t>(texts: impl IntoIterator<Item = &'t str>) -> Vec<Self> {
        let document = |(i, text): (usize, &str)| Self { line: i + 1, prompt: None, text: text.to_owned() };
        texts.into_iter().enumerate().map(document).collect()
    }
}

impl CausalLm {
    /// What the model predicts, and where it ends.
    ///
    /// # Errors
    /// The family predicts no next token, or no token of the model's ends a text.
    pub fn from_config(config: &ModelConfig) -> Result<Self> {
        manifest::manifest(|o| config.family.define(o, Head::CausalLm { wanted: None }).map(drop))?;
        if config.raw.get("tie_word_embeddings").and_then(Value::as_bool) == Some(false) {
            bail_unusable!(
                "tie_word_embeddings is false; tk's head shares the weight of the word embeddings"
            );
        }
        let vocabulary = config.vocab_size();
        token_ids::check(&config.raw, vocabulary)?;
        let ids = |key: &str| token_ids::read(&config.raw, key, vocabulary);
        let ends = match ids("eos_token_id")? {
            Some(ends) => ends,
            None if (GPT2_END as usize) < vocabulary => vec![GPT2_END],
            None => bail_unusable!(
                "eos_token_id is missing, so it is GPT-2's, {GPT2_END}, and vocab_size is {vocabulary}: \
                 set it to the token that ends a text"
            ),
        };
        let start = ids("bos_token_id")?.and_then(|start| start.first().copied()).or(ends.first().copied());
        let begins = config.raw.get(FIRST_TOKENS).and_then(Value::as_bool) != Some(false);
        Ok(Self { vocabulary, ends, start, begins })
    }

    pub(super) fn define<O: Ops>(&self, o: &O, family: &Family) -> Result<O::X> {
        family.define(o, Head::CausalLm { wanted: None })
    }

    pub(super) fn generate<O: Ops>(&self, o: &O, family: &Family) -> Result<O::X> {
        family.define(o, Head::CausalLm { wanted: Some(Pick::Last) })
    }

    pub(super) fn outputs(&self, form: Form) -> Vec<Output> {
        let tokens = if form == Form::InPlace { Dim::Asked } else { Dim::Sequence };
        vec![Output { name: "logits", dims: vec![Dim::Batch, tokens, Dim::Of(self.vocabulary)] }]
    }

    pub(super) fn write_config(&self, config: &mut ModelConfig) {
        let class = config.family.class(Head::CausalLm { wanted: None });
        config.raw.insert("architectures".to_owned(), json!([class]));
        // a list stays one; where fields are absent, transformers takes GPT-2's
        config.raw.entry("eos_token_id").or_insert_with(|| json!(self.ends.first()));
        if let Some(start) = self.start.filter(|_| GPT2_END as usize >= self.vocabulary) {
            config.raw.entry("bos_token_id").or_insert_with(|| json!(start));
        }
        config.raw.remove(FIRST_TOKENS);
        if !self.begins {
            config.raw.insert(FIRST_TOKENS.to_owned(), json!(false));
        }
    }

    /// Whether a model that learns from these documents learns what a text begins with: something stands in front of
    /// every text, in front of those that are joined to others, or of one whose prompt is empty.
    ///
    /// # Errors
    /// As [`Tokenizer::around`].
    pub fn shows_beginnings(documents: &[Document], tokenizer: &Tokenizer, cutting: Cutting) -> Result<bool> {
        let joined = cutting == Cutting::Concatenated && documents.len() > 1;
        Ok(joined
            || !tokenizer.around()?.0.is_empty()
            || documents.iter().any(|document| document.prompt.as_deref() == Some("")))
    }

    /// Documents as examples of at most `max_length` tokens. A document is what the tokenizer gives for it, with the
    /// tokens that it puts around a text, and ends with one of `ends`; between a prompt and its completion stands
    /// nothing. Predicted is every token of a text that another stands in front of, and the completion of a prompt.
    ///
    /// # Errors
    /// Unusable: a `max_length` that has no room for a token to predict.
    pub fn examples(
        &self,
        documents: &[Document],
        tokenizer: &Tokenizer,
        max_length: usize,
        cutting: Cutting,
    ) -> Result<Vec<Example>> {
        let around = tokenizer.around()?;
        let least = around.0.len().max(1) + 1;
        if max_length < least {
            bail_unusable!(
                "a maximum length of {max_length} has no room for a token that could be predicted: {least} at least"
            );
        }
        let prompts: Vec<&str> =
            documents.iter().map(|document| document.prompt.as_deref().unwrap_or("")).collect();
        let texts: Vec<&str> = documents.iter().map(|document| document.text.as_str()).collect();
        let (prompts, texts) = (tokenizer.bodies(&prompts)?, tokenizer.bodies(&texts)?);
        let wholes = documents
            .iter()
            .zip(prompts.into_iter().zip(texts))
            .map(|(document, (prompt, text))| self.whole(document, &prompt, text, &around));
        let mut examples = Vec::new();
        if cutting == Cutting::Concatenated {
            self.join(wholes).cut(max_length, false, &mut examples);
            return Ok(examples);
        }
        for mut whole in wholes.filter(|whole| !whole.empty) {
            let mut truncated = false;
            if whole.prompted && whole.ids.len() > max_length {
                let completion = whole.ids.len() - whole.first;
                // a token of the prompt at least stands in front of the completion
                let room = max_length.saturating_sub(completion).max(whole.kept + 1);
                if room >= whole.first {
                    // all of it stands in front of the first window
                } else if room + completion <= max_length || cutting == Cutting::Training {
                    truncated |= whole.forget(whole.first - room);
                } else if whole.first >= max_length {
                    truncated |= whole.forget(whole.first - (max_length / 2).max(whole.kept + 1));
                }
                if cutting == Cutting::Training && whole.ids.len() > max_length {
                    whole.truncate(max_length);
                    truncated = true;
                }
            }
            whole.cut(max_length, truncated, &mut examples);
        }
        Ok(examples)
    }

    /// A document's tokens, uncut.
    fn whole(&self, document: &Document, prompt: &Body, text: Body, around: &(Vec<u32>, Vec<u32>)) -> Whole {
        let (before, behind) = around;
        let mut whole = Whole {
            empty: document.prompt.is_none() && text.ids.is_empty(),
            prompted: document.prompt.is_some(),
            ..Whole::default()
        };
        whole.extend(before, None);
        if document.prompt.as_deref() == Some("") && before.is_empty() {
            whole.extend(self.start.as_slice(), None);
        }
        whole.kept = whole.ids.len();
        whole.extend(&prompt.ids, None);
        let shown = whole.ids.len();
        whole.first = if whole.prompted { shown.max(1) } else { 1 };
        whole.extend(&text.ids, Some(&text.bytes));
        whole.extend(behind, None);
        let ended = whole.ids[shown..].last().is_some_and(|last| self.ends.contains(last));
        if !ended {
            whole.extend(&self.ends[..self.ends.len().min(1)], None);
        }
        whole.predicted = (0..whole.ids.len()).map(|i| i >= whole.first).collect();
        whole
    }

    /// Documents one after another: tokens then see those of the document before theirs. Where one begins with the end
    /// token, that of the one before is it.
    fn join(&self, wholes: impl Iterator<Item = Whole>) -> Whole {
        let mut all = Whole::default();
        for mut whole in wholes {
            if !whole.prompted {
                whole.predicted.fill(true);
            }
            let starts = whole.kept > 0 && whole.ids.first() == all.ids.last();
            let skipped = usize::from(starts && whole.ids.first().is_some_and(|id| self.ends.contains(id)));
            all.ids.extend(&whole.ids[skipped..]);
            all.bytes.extend(&whole.bytes[skipped..]);
            all.predicted.extend(&whole.predicted[skipped..]);
        }
        all
    }

    /// Each token's target: the token behind it, where that is to be predicted. (T), of a whole packed batch.
    pub fn targets(examples: &[&Encoding], targets: &[&Target]) -> Vec<Option<u32>> {
        let mut wanted = Vec::new();
        for (encoding, target) in examples.iter().zip(targets) {
            let Target::Next(next) = target else { continue };
            let behind = encoding.ids.iter().zip(&next.predicted).skip(1);
            wanted.extend(behind.map(|(&id, &predicted)| predicted.then_some(id)));
            wanted.push(None);
        }
        wanted
    }

    /// The metrics of predicted tokens: mean loss in nats a token, perplexity, and bits a byte of text.
    pub fn measured(losses: f64, targets: &[&Target]) -> Metrics {
        let nexts = || {
            targets
                .iter()
                .filter_map(|target| if let Target::Next(next) = target { Some(next) } else { None })
        };
        let tokens: usize = nexts().map(Next::count).sum();
        let bytes: usize = nexts().map(|next| next.bytes).sum();
        let loss = losses / tokens as f64;
        Metrics::from([
            ("loss".to_owned(), loss),
            ("perplexity".to_owned(), loss.exp()),
            ("bits_per_byte".to_owned(), losses / std::f64::consts::LN_2 / bytes as f64),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The end in a vocabulary that is trained below.
    const END: u32 = 0;

    fn lm() -> CausalLm {
        CausalLm { vocabulary: 300, ends: vec![END, 299], start: Some(END), begins: true }
    }

    /// Every byte is a token, so ids are easy to read.
    fn tokenizer() -> Tokenizer {
        let tokenizer = Tokenizer::train(&["x"], 257).unwrap();
        assert_eq!(tokenizer.end(), Some(END));
        tokenizer
    }

    /// The same with tokens of its own around a text.
    fn template(single: &str) -> Tokenizer {
        let dir = tempfile::tempdir().unwrap();
        tokenizer().save(dir.path(), dir.path()).unwrap();
        let path = dir.path().join("tokenizer.json");
        let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let part = |part: &str| match part {
            "A" => json!({"Sequence": {"id": "A", "type_id": 0}}),
            special => json!({"SpecialToken": {"id": special, "type_id": 0}}),
        };
        let single: Vec<Value> = single.split(' ').map(part).collect();
        json["post_processor"] = json!({
            "type": "TemplateProcessing", "single": single, "pair": single,
            "special_tokens": {
                "<|endoftext|>": {"id": "<|endoftext|>", "ids": [END], "tokens": ["<|endoftext|>"]},
                "#": {"id": "#", "ids": [tokenizer().inner().token_to_id("#").unwrap()], "tokens": ["#"]},
            },
        });
        std::fs::write(&path, json.to_string()).unwrap();
        Tokenizer::open(dir.path()).unwrap()
    }

    fn document(prompt: Option<&str>, text: &str) -> Document {
        Document { line: 1, prompt: prompt.map(str::to_owned), text: text.to_owned() }
    }

    /// Each example's text, with `|` for the end and a capital for a token that is predicted, the end's `!`.
    fn shown(examples: &[Example], tokenizer: &Tokenizer) -> Vec<String> {
        let token = |(&id, &predicted): (&u32, &bool)| match (id == END, predicted) {
            (true, true) => "!".to_owned(),
            (true, false) => "|".to_owned(),
            (false, true) => tokenizer.inner().id_to_token(id).unwrap().to_uppercase(),
            (false, false) => tokenizer.inner().id_to_token(id).unwrap(),
        };
        examples
            .iter()
            .map(|example| {
                let Target::Next(next) = &example.target else { panic!() };
                example.encoding.ids.iter().zip(&next.predicted).map(token).collect()
            })
            .collect()
    }

    fn bytes(examples: &[Example]) -> Vec<usize> {
        let bytes = |example: &Example| if let Target::Next(next) = &example.target { next.bytes } else { 0 };
        examples.iter().map(bytes).collect()
    }

    #[test]
    fn every_token_but_a_texts_first_is_predicted_once() {
        let tokenizer = tokenizer();
        let documents =
            [document(None, "abcdefg"), document(None, ""), document(None, "xyz"), document(None, "q")];
        let examples = lm().examples(&documents, &tokenizer, 4, Cutting::Training).unwrap();
        assert_eq!(shown(&examples, &tokenizer), ["aBCD", "dEFG", "g!", "xYZ!", "q!"]);
        assert_eq!(bytes(&examples), [3, 3, 0, 2, 0], "the end of a text is no byte of it");
        let joined = lm().examples(&documents, &tokenizer, 6, Cutting::Concatenated).unwrap();
        assert_eq!(shown(&joined, &tokenizer), ["aBCDEF", "fG!!XY", "yZ!Q!"]);
    }

    #[test]
    fn tokens_of_the_tokenizers_own_stand_around_a_text_once_and_are_not_doubled() {
        let documents = [
            document(None, "abcdefg"),
            document(None, "xy<|endoftext|>"),
            document(Some("a"), "cd"),
            document(None, ""),
        ];
        for (single, expected, joined) in [
            ("A", ["aBCDE", "eFG!", "xY!", "aCD!"].as_slice(), "aBCDEFG!XY!aCD!!"),
            ("<|endoftext|> A", &["|ABCD", "dEFG!", "|XY!", "|aCD!"], "|ABCDEFG!XY!aCD!!"),
            ("<|endoftext|> A <|endoftext|>", &["|ABCD", "dEFG!", "|XY!!", "|aCD!"], "|ABCDEFG!XY!!aCD!!"),
            ("# A <|endoftext|>", &["#ABCD", "dEFG!", "#XY!!", "#aCD!"], "#ABCDEFG!#XY!!#aCD!#!"),
            ("A #", &["aBCDE", "eFG#!", "xY!#!", "aCD#!"], "aBCDEFG#!XY!#!aCD#!#!"),
        ] {
            let tokenizer = template(single);
            let examples = lm().examples(&documents, &tokenizer, 5, Cutting::Evaluation).unwrap();
            assert_eq!(shown(&examples, &tokenizer), expected, "{single}");
            assert!(examples.iter().all(|example| !example.encoding.truncated));
            let all = lm().examples(&documents, &tokenizer, 99, Cutting::Concatenated).unwrap();
            assert_eq!(shown(&all, &tokenizer), [joined], "{single}");
        }
    }

    #[test]
    fn of_a_prompt_nothing_is_predicted_and_its_front_makes_room() {
        let tokenizer = tokenizer();
        let documents =
            [document(Some("abc"), "xy"), document(Some("abcdef"), "xy"), document(Some("abc"), "uvwxyz")];
        let examples = lm().examples(&documents, &tokenizer, 6, Cutting::Training).unwrap();
        assert_eq!(shown(&examples, &tokenizer), ["abcXY!", "defXY!", "cUVWXY"]);
        assert_eq!(examples.iter().map(|e| e.encoding.truncated).collect::<Vec<_>>(), [false, true, true]);
        let joined = lm().examples(&documents, &tokenizer, 99, Cutting::Concatenated).unwrap();
        assert_eq!(shown(&joined, &tokenizer), ["abcXY!abcdefXY!abcUVWXYZ!"]);
        // what the tokenizer puts in front stays there
        let begun = tokenizer.starting_with(END).unwrap();
        let examples = lm().examples(&documents, &begun, 6, Cutting::Training).unwrap();
        assert_eq!(shown(&examples, &begun), ["|bcXY!", "|efXY!", "|cUVWX"]);
    }

    #[test]
    fn a_long_completion_is_measured_whole() {
        let tokenizer = tokenizer();
        let documents = [document(Some("abc"), "uvwxyz"), document(Some("abcdefgh"), "uvwxyz")];
        let examples = lm().examples(&documents, &tokenizer, 6, Cutting::Evaluation).unwrap();
        assert_eq!(shown(&examples, &tokenizer), ["abcUVW", "wXYZ!", "fghUVW", "wXYZ!"]);
        let cut = examples.iter().map(|e| e.encoding.truncated).collect::<Vec<_>>();
        assert_eq!(cut, [false, false, true, false], "a prompt that does not fit is cut, and that is said");
        assert_eq!(bytes(&examples), [3, 3, 3, 3]);
    }

    #[test]
    fn behind_an_empty_prompt_the_first_token_is_learnt() {
        let tokenizer = tokenizer();
        let documents = [document(Some(""), "xy"), document(Some(""), "")];
        let examples = lm().examples(&documents, &tokenizer, 6, Cutting::Training).unwrap();
        assert_eq!(shown(&examples, &tokenizer), ["|XY!", "|!"]);
        let shows = |documents: &[Document], tokenizer: &Tokenizer, cutting| {
            CausalLm::shows_beginnings(documents, tokenizer, cutting).unwrap()
        };
        let texts = Document::of_texts(["a", "b"]);
        assert!(shows(&documents, &tokenizer, Cutting::Training));
        assert!(!shows(&texts, &tokenizer, Cutting::Training));
        assert!(shows(&texts, &tokenizer, Cutting::Concatenated));
        let begun = tokenizer.starting_with(END).unwrap();
        assert!(shows(&texts, &begun, Cutting::Training));
        let examples = lm().examples(&texts, &begun, 6, Cutting::Training).unwrap();
        assert_eq!(shown(&examples, &begun), ["|A!", "|B!"]);
    }

    #[test]
    fn a_length_without_room_for_a_token_to_predict_is_refused() {
        let documents = [document(None, "abc"), document(Some("abc"), "xyz")];
        for cutting in [Cutting::Training, Cutting::Evaluation, Cutting::Concatenated] {
            for (tokenizer, least) in [(tokenizer(), 2), (template("# # # A"), 4)] {
                for length in 0..least {
                    let error = lm().examples(&documents, &tokenizer, length, cutting).unwrap_err();
                    assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
                    assert!(error.to_string().contains(&format!("{least} at least")), "{error:#}");
                }
                let examples = lm().examples(&documents, &tokenizer, least, cutting).unwrap();
                assert!(examples.iter().all(|example| example.encoding.len() <= least));
            }
        }
    }

    #[test]
    fn the_ends_are_a_number_a_list_or_none_and_are_kept() {
        let of = |fields: Value| -> Result<(CausalLm, ModelConfig)> {
            let mut config = json!({
                "model_type": "gpt2", "vocab_size": 300, "n_positions": 8, "n_embd": 4, "n_layer": 1, "n_head": 1,
            });
            config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
            let mut config = ModelConfig::parse(&config.to_string())?;
            let lm = CausalLm::from_config(&config)?;
            lm.write_config(&mut config);
            Ok((lm, config))
        };
        for (value, ends, start) in [
            (json!(7), vec![7], Some(7)),
            (json!([7, 299]), vec![7, 299], Some(7)),
            (json!([299]), vec![299], Some(299)),
            (json!(null), vec![], None),
        ] {
            let (lm, config) = of(json!({"eos_token_id": value})).unwrap();
            assert_eq!((lm.ends, lm.start), (ends, start));
            assert_eq!(config.raw["eos_token_id"], value);
        }
        assert_eq!(of(json!({"eos_token_id": 7, "bos_token_id": 5})).unwrap().0.start, Some(5));
        let (lm, config) = of(json!({"vocab_size": 50_257})).unwrap();
        assert_eq!((lm.ends, &config.raw["eos_token_id"]), (vec![50_256], &json!(50_256)));
        for (fields, said) in [
            (json!({}), "eos_token_id is missing"),
            (json!({"eos_token_id": [7, 300]}), "eos_token_id is [7,300]"),
            (json!({"eos_token_id": 7, "pad_token_id": 50_256}), "pad_token_id is 50256"),
            (json!({"eos_token_id": 7, "bos_token_id": -1}), "bos_token_id is -1"),
        ] {
            let error = of(fields).unwrap_err();
            assert!(error.to_string().starts_with(said), "{error:#}");
        }
    }

    #[test]
    fn a_tokens_target_is_the_one_behind_it() {
        let tokenizer = tokenizer();
        let documents = [document(Some("ab"), "x"), document(None, "yz")];
        let examples = lm().examples(&documents, &tokenizer, 9, Cutting::Training).unwrap();
        let (encodings, targets): (Vec<&Encoding>, Vec<&Target>) =
            examples.iter().map(|example| (&example.encoding, &example.target)).unzip();
        let id = |text: &str| tokenizer.inner().token_to_id(text);
        let expected = [None, id("x"), Some(END), None, id("z"), Some(END), None];
        assert_eq!(CausalLm::targets(&encodings, &targets), expected);
    }
}
