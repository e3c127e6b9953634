//! BERT's own objective: masked words and next sentences at once (Devlin et al. 2018, arXiv:1810.04805, 3.1).

use candle_core::Tensor;
use serde::{Deserialize, Serialize};
use serde_json::{Map, json};

use super::masked_lm::{self, Masked, Masking, check_tied, encoded, fills, found, masks, write_class};
use super::next_sentence::{self, Chunk, Corpus, Pair, UNIT};
use super::{
    Answer, Asking, Beside, Dim, Encoder, Example, Form, Learning, Look, Measured, Metric, Metrics,
    Objective, Output, Outputs, Start,
};
use crate::Result;
use crate::data::batch::Encoding;
use crate::data::records::{BadRow, Columns, Files, How, Row};
use crate::data::tokens::Tokenizer;
use crate::eager::kernels::dropout::mix;
use crate::eager::{Eager, Forward, X};
use crate::model::{Head, ModelConfig};

/// A model of both.
#[derive(Clone, Debug, PartialEq)]
pub struct PreTraining {
    /// V, the scores of a place.
    pub vocabulary: usize,
    /// How a model that learns is asked for words.
    pub masking: Option<Masking>,
}

/// Flags of records: it has none of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(default)]
pub struct RecordFlags {}

/// Flags of training: it has none of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[group(skip)]
#[serde(default)]
pub struct TrainingFlags {}

/// Flags of answers: it has none of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args, Serialize)]
#[group(skip)]
pub struct AnswerFlags {}

/// A pair, some of whose words are to be found.
#[derive(Clone, Debug, PartialEq)]
pub struct Pretrained {
    /// None of a pair that stands for itself.
    pub chunk: Option<Chunk>,
    /// Whether the second text follows the first.
    pub follows: bool,
    pub masked: Masked,
}

/// What is asked of a record: its masks, and whether it is a pair.
pub struct Question {
    places: Vec<usize>,
    is_pair: bool,
}

impl Objective for PreTraining {
    const NAME: &'static str = "masked-lm,next-sentence";
    const HEAD: Head = Head::PreTraining;
    const TEXTS_LEARNT: &'static [&'static str] = &["text"];
    const TEXTS_ASKED: &'static [&'static str] = &["text", "text_pair"];
    const FIELDS_ANSWERED: &'static [&'static str] = &["fills", "label", "score", "scores"];
    const RECORD_FLAGS: &'static [&'static str] = &["--text-unit"];
    const TRAINING_FLAGS: &'static [&'static str] = &["--mask-probability", "--whole-words"];
    const ANSWER_FLAGS: &'static [&'static str] = &["--top-k"];
    const LOSSES: &'static [&'static str] = &["masked_lm_loss", "next_sentence_loss"];

    type Target = Pretrained;
    type Question = Question;

    fn from_config(config: &ModelConfig) -> Result<Self> {
        check_tied(config)?;
        Ok(Self { vocabulary: config.vocab_size(), masking: None })
    }

    fn write_config(&self, config: &mut ModelConfig) {
        write_class(config, self.head());
    }

    fn reading(flags: &super::RecordFlags) -> (How, Columns) {
        masked_lm::reading(flags, UNIT)
    }

    fn learn(start: &mut Start) -> Result<Learning<Self, Pretrained>> {
        let texts = masked_lm::read(start.train, start.records, UNIT)?;
        let (tokenizer, _) = start.tokenizer_of(&texts.iter().map(String::as_str).collect::<Vec<_>>())?;
        let task = Self::from_config(&start.config).map_err(|error| start.in_config(error))?;
        let masking = Masking::learnt(&tokenizer, task.vocabulary, &start.training.shared)?;
        let examples = learnt(&texts, start.train, &tokenizer, start.max_length)?;
        Ok(Learning { task: Self { masking: Some(masking), ..task }, tokenizer, examples, files: Vec::new() })
    }

    fn learnt(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Pretrained>>> {
        let texts = masked_lm::read(files, encoder.records, UNIT)?;
        learnt(&texts, files, encoder.tokenizer, encoder.max_length)
    }

    /// Each chunk parts and is masked in the same way every time.
    fn examples(&self, files: &Files, encoder: &Encoder) -> Result<Vec<Example<Pretrained>>> {
        let masking = Masking::measured(encoder.tokenizer, self.vocabulary)?;
        let texts = masked_lm::read(files, encoder.records, UNIT)?;
        let chunks = Corpus::new(&texts, files, encoder.tokenizer)?.chunks(encoder.max_length)?;
        chunks.into_iter().zip(0..).map(|(chunk, i)| example(chunk, &masking, mix(i))).collect()
    }

    fn look(&self, files: &Files, flags: &super::RecordFlags) -> Result<Vec<Look>> {
        masked_lm::look(files, flags, UNIT)
    }

    fn beside(&self, target: &Pretrained, tokenizer: &Tokenizer) -> Beside {
        target.masked.beside(tokenizer)
    }

    fn losses(target: &Pretrained) -> Vec<usize> {
        vec![target.masked.count(), 1]
    }

    fn drawn(&self, learnt: &Example<Pretrained>, key: u64) -> Result<Option<Example<Pretrained>>> {
        let (Some(masking), Some(chunk)) = (&self.masking, &learnt.target.chunk) else { return Ok(None) };
        example(chunk.clone(), masking, key).map(Some)
    }

    fn asked(target: &Pretrained) -> Option<Vec<usize>> {
        Some(target.masked.places())
    }

    fn head(&self) -> Head {
        Self::HEAD
    }

    fn outputs(&self, _: Form) -> Vec<Output> {
        vec![
            Output {
                name: "prediction_logits",
                dims: vec![Dim::Batch, Dim::Sequence, Dim::Of(self.vocabulary)],
            },
            Output { name: "seq_relationship_logits", dims: vec![Dim::Batch, Dim::Of(2)] },
        ]
    }

    /// As in transformers, the sum of two means: one over masked tokens, one over pairs.
    fn loss(
        &self,
        eager: &Eager,
        outputs: Vec<X>,
        examples: &[(&Encoding, &Pretrained)],
        label_smoothing: f64,
        of: &[f64],
    ) -> Result<Vec<Tensor>> {
        let [scores, relation] = &outputs[..] else {
            anyhow::bail!("the model has {} outputs", outputs.len())
        };
        let wanted: Vec<Option<u32>> =
            examples.iter().flat_map(|(_, target)| target.masked.of_rows()).collect();
        let follows: Vec<bool> = examples.iter().map(|(_, target)| target.follows).collect();
        Ok(vec![
            eager.cross_entropy(scores, &wanted, label_smoothing as f32, 1.0 / of[0] as f32)?,
            next_sentence::loss(eager, relation, &follows, label_smoothing, of[1])?,
        ])
    }

    fn metrics(&self) -> &'static [Metric] {
        const {
            &[
                Metric::LOSS,
                Metric::falling("masked_lm_loss"),
                Metric::rising("masked_lm_accuracy"),
                Metric::falling("next_sentence_loss"),
                Metric::rising("next_sentence_accuracy"),
            ]
        }
    }

    fn measure(&self, model: &Forward, examples: &[(&Encoding, &Pretrained)]) -> Result<Measured> {
        let encodings: Vec<&Encoding> = examples.iter().map(|(encoding, _)| *encoding).collect();
        let kept = model.asked(
            &encodings,
            |i| Some(examples[i].1.masked.places()),
            |i, mut outputs| {
                let wanted: Vec<Option<u32>> = examples[i].1.masked.of_rows().collect();
                let scores = outputs.first_mut().ok_or_else(|| anyhow::anyhow!("the model has no output"))?;
                *scores = found(scores, &wanted)?;
                Ok(outputs)
            },
        )?;
        let targets: Vec<&Pretrained> = examples.iter().map(|(_, target)| *target).collect();
        self.measure_outputs(&kept, &targets)
    }

    fn kept(&self, mut outputs: Outputs, target: &Pretrained) -> Result<Outputs> {
        let scores = outputs.first_mut().ok_or_else(|| anyhow::anyhow!("the model has no output"))?;
        *scores = found(scores, &target.masked.wanted)?;
        Ok(outputs)
    }

    fn measure_outputs(&self, outputs: &[Outputs], targets: &[&Pretrained]) -> Result<Measured> {
        let rows = outputs.iter().map(|outputs| next_sentence::row(outputs.get(1)));
        let rows = rows.collect::<Result<Vec<_>>>()?;
        let masked = masked_lm::measured(outputs.iter().filter_map(|outputs| outputs.first()));
        let next = next_sentence::measured(&rows, targets.iter().map(|target| target.follows));
        let mut metrics = Metrics::from([("loss".to_owned(), masked["loss"] + next["loss"])]);
        for (task, own) in [("masked_lm", &masked), ("next_sentence", &next)] {
            for name in ["loss", "accuracy"] {
                metrics.insert(format!("{task}_{name}"), own[name]);
            }
        }
        let details = [("masked_lm", json!(masked)), ("next_sentence", json!(next))];
        let details = details.map(|(task, own)| (task.to_owned(), own)).into_iter().collect();
        Ok(Measured { metrics, details })
    }

    fn columns(flags: &super::AnswerFlags) -> Columns {
        flags.texts.columns()
    }

    fn ask(&self, row: &Row, asking: &Asking) -> Result<(Vec<Encoding>, Question), BadRow> {
        let pair = row.optional_text(&asking.columns, "text_pair")?.filter(|pair| !pair.is_empty());
        let encoding = encoded(row, pair, asking)?;
        let (places, is_pair) = (masks(row, &encoding, asking)?, pair.is_some());
        if places.is_empty() && !is_pair {
            return Err(row.bad("the text has no mask, and no second text that might follow it"));
        }
        Ok((vec![encoding], Question { places, is_pair }))
    }

    fn answer(&self, question: &Question, outputs: &[Outputs], asking: &Asking) -> Result<Answer> {
        let Some([scores, relation]) = outputs.first().map(|outputs| &outputs[..]) else {
            anyhow::bail!("the model gives other outputs than it has")
        };
        let mut fields = Map::new();
        if !question.places.is_empty() {
            match fills(scores, &question.places, asking)? {
                Ok(fills) => fields.insert("fills".to_owned(), fills),
                Err(bad) => return Ok(Err(bad)),
            };
        }
        if question.is_pair {
            match next_sentence::answer(&next_sentence::row(Some(relation))?) {
                Ok(said) => fields.extend(said),
                Err(bad) => return Ok(Err(bad)),
            }
        }
        Ok(Ok(fields))
    }
}

/// Documents' chunks, which part elsewhere and are masked otherwise at every step.
fn learnt(
    texts: &[String],
    files: &Files,
    tokenizer: &Tokenizer,
    max_length: usize,
) -> Result<Vec<Example<Pretrained>>> {
    let chunks = Corpus::new(texts, files, tokenizer)?.chunks(max_length)?;
    let of_chunk = |chunk: Chunk| {
        let Pair { encoding, words, follows } = chunk.pair(0)?;
        let masked = Masked { wanted: vec![None; words.len()], words: words.into() };
        Ok(Example { encoding, target: Pretrained { chunk: Some(chunk), follows, masked } })
    };
    chunks.into_iter().map(of_chunk).collect()
}

/// The pair that a key draws, and the words that are to be found in it.
fn example(chunk: Chunk, masking: &Masking, key: u64) -> Result<Example<Pretrained>> {
    let Pair { encoding, words, follows } = chunk.pair(key)?;
    let Example { encoding, target: masked } = masking.masked(&encoding, &words, mix(key));
    Ok(Example { encoding, target: Pretrained { chunk: Some(chunk), follows, masked } })
}
