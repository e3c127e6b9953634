//! How text is generated, under the names and with the meanings that transformers' `GenerationConfig` has.

use std::fmt::Display;
use std::str::FromStr;

use serde_json::{Map, Value};

use crate::{Result, bail_unusable, unusable};

/// What decides which tokens follow a prompt, and when they end.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that may follow the prompt.
    pub max_new_tokens: usize,
    /// What scores are divided by before a token is drawn. 0: nothing is drawn, the best token is taken
    /// (greedy).
    pub temperature: f32,
    /// Only so many of the best tokens are drawn from. 0: all.
    pub top_k: usize,
    /// Only the best tokens that together reach this probability are drawn from. 1: all.
    pub top_p: f32,
    /// Only tokens of at least this share of the best token's probability are drawn from. 0: all.
    pub min_p: f32,
    /// What the scores of tokens that were seen are divided by; negative ones are multiplied. 1: none.
    pub repetition_penalty: f32,
    /// Sequences that a beam search goes on with. 1: no beam search.
    pub num_beams: usize,
    /// A finished beam's score is its log-probability over its length to this power: above 0 favours long
    /// ones.
    pub length_penalty: f32,
    /// Answers for a prompt.
    pub num_return_sequences: usize,
    /// Texts that end an answer, and are not part of it.
    pub stop: Vec<String>,
    /// The seed of what is drawn.
    pub seed: u64,
    /// Which of many records with one seed this is: each draws numbers of its own. 0 where the seed alone decides.
    pub record: u64,
    /// Whether the log-probability of every token is told, and those of how many of the likeliest.
    pub logprobs: Option<usize>,
    /// Whether those of the prompt's tokens are told, too: all of it is read then, in parts, whatever others have read.
    pub prompt_logprobs: bool,
}

/// The most beams of a search.
pub const MOST_BEAMS: usize = 4096;

/// The most answers for a prompt.
pub const MOST_SEQUENCES: usize = 4096;

/// The most of the likeliest tokens that are told of.
pub const MOST_LOGPROBS: usize = 5;

/// The most stop texts, and the most bytes of one.
pub const MOST_STOPS: (usize, usize) = (256, 4096);

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: 128,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            num_beams: 1,
            length_penalty: 1.0,
            num_return_sequences: 1,
            stop: Vec::new(),
            seed: 42,
            record: 0,
            logprobs: None,
            prompt_logprobs: false,
        }
    }
}

impl GenerationConfig {
    /// Holds the settings against their ranges and against each other.
    ///
    /// # Errors
    /// Unusable: a value out of its range, or one that has no effect beside the others.
    pub fn check(&self) -> Result<()> {
        let number = |field: &str, found: &dyn Display, fits: bool, expected: &str| {
            if fits { Ok(()) } else { Err(unusable!("{field} is {found}, expected {expected}")) }
        };
        let (t, penalty, beams) = (self.temperature, self.repetition_penalty, self.num_beams);
        let finite = t.is_finite() && t >= 0.0;
        let share = (0.0..=1.0).contains(&self.top_p) && self.top_p > 0.0;
        let returned = self.num_return_sequences;
        number("max_new_tokens", &self.max_new_tokens, self.max_new_tokens > 0, "1 or more")?;
        number("temperature", &t, finite, "0 (greedy) or a finite number above it")?;
        number("top_p", &self.top_p, share, "a number above 0 and up to 1")?;
        number("min_p", &self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1")?;
        let positive = penalty.is_finite() && penalty > 0.0;
        number("repetition_penalty", &penalty, positive, "a finite number above 0")?;
        number("num_beams", &beams, (1..=MOST_BEAMS).contains(&beams), "1 to 4096")?;
        number("length_penalty", &self.length_penalty, self.length_penalty.is_finite(), "a finite number")?;
        let sequences = (1..=MOST_SEQUENCES).contains(&returned);
        number("num_return_sequences", &returned, sequences, "1 to 4096; more records give more")?;
        number(
            "stop",
            &format_args!("a list of {}", self.stop.len()),
            self.stop.len() <= MOST_STOPS.0,
            "256 at most",
        )?;
        if let Some(stop) = self.stop.iter().find(|stop| stop.len() > MOST_STOPS.1) {
            bail_unusable!("stop has a text of {} bytes, expected {} at most", stop.len(), MOST_STOPS.1);
        }
        if let Some(most) = self.logprobs {
            number("logprobs", &most, most <= MOST_LOGPROBS, "0 to 5")?;
            if self.num_beams > 1 {
                bail_unusable!(
                    "logprobs is {most} and num_beams is {}: a beam search tells none",
                    self.num_beams
                );
            }
        }
        if self.num_beams > 1 && !self.stop.is_empty() {
            bail_unusable!(
                "stop is given and num_beams is {}: a beam search ends by its tokens alone",
                self.num_beams
            );
        }
        if self.stop.iter().any(String::is_empty) {
            bail_unusable!("stop has an empty text, expected texts of at least one character");
        }
        if t == 0.0 && self.filters() {
            bail_unusable!(
                "temperature is 0, so nothing is drawn, and top_k {}, top_p {} and min_p {} have no effect: \
                 give a temperature above 0",
                self.top_k,
                self.top_p,
                self.min_p
            );
        }
        if t > 0.0 && beams > 1 {
            bail_unusable!(
                "num_beams is {beams} and temperature is {t}, expected 0: a beam search draws nothing"
            );
        }
        if returned > 1 && t == 0.0 && beams == 1 {
            bail_unusable!(
                "num_return_sequences is {returned} and temperature is 0, so all would be equal: \
                 give a temperature above 0, or num_beams"
            );
        }
        if beams > 1 && returned > beams {
            bail_unusable!("num_return_sequences is {returned}, expected at most num_beams, {beams}");
        }
        Ok(())
    }

    /// These settings with those that a record gives by their names: numbers, also as text, and for `stop` a
    /// text or a list. A seed that a record gives repeats wherever the record stands. Null is none given; other keys are not looked at. A record that asks for `top_k`,
    /// `top_p` or `min_p` where the settings are greedy asks for drawing: its temperature is 1 unless it
    /// gives one.
    ///
    /// # Errors
    /// Unusable: a value that is no such number or text, or settings that [`GenerationConfig::check`] refuses.
    pub fn with(&self, overrides: &Map<String, Value>) -> Result<GenerationConfig> {
        let mut settings = self.clone();
        let (count, number) = ("a whole number", "a number");
        set(&mut settings.max_new_tokens, overrides, "max_new_tokens", count)?;
        set(&mut settings.top_k, overrides, "top_k", count)?;
        set(&mut settings.top_p, overrides, "top_p", number)?;
        set(&mut settings.min_p, overrides, "min_p", number)?;
        set(&mut settings.repetition_penalty, overrides, "repetition_penalty", number)?;
        set(&mut settings.num_beams, overrides, "num_beams", count)?;
        set(&mut settings.length_penalty, overrides, "length_penalty", number)?;
        set(&mut settings.num_return_sequences, overrides, "num_return_sequences", count)?;
        if set(&mut settings.seed, overrides, "seed", count)? {
            settings.record = 0;
        }
        let given = |key: &str| overrides.get(key).is_some_and(|value| !value.is_null());
        if !set(&mut settings.temperature, overrides, "temperature", number)?
            && settings.temperature == 0.0
            && settings.filters()
            && ["top_k", "top_p", "min_p"].into_iter().any(given)
        {
            settings.temperature = 1.0;
        }
        match overrides.get("stop") {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => settings.stop = vec![text.clone()],
            Some(value) => {
                let texts = value.as_array().and_then(|texts| {
                    texts.iter().map(|text| text.as_str().map(str::to_owned)).collect::<Option<_>>()
                });
                settings.stop =
                    texts.ok_or_else(|| unusable!("stop is {value}, expected a text or a list of texts"))?;
            }
        }
        settings.check()?;
        Ok(settings)
    }

    /// Whether some tokens are never drawn.
    fn filters(&self) -> bool {
        self.top_k > 0 || self.top_p < 1.0 || self.min_p > 0.0
    }
}

/// Takes a number that a record gives; whether it gives one.
fn set<T: FromStr>(field: &mut T, record: &Map<String, Value>, key: &str, expected: &str) -> Result<bool> {
    let parsed = match record.get(key) {
        None | Some(Value::Null) => return Ok(false),
        Some(Value::String(text)) => text.trim().parse().ok(),
        Some(Value::Number(number)) => number.to_string().parse().ok(),
        Some(_) => None,
    };
    *field = parsed.ok_or_else(|| unusable!("{key} is {}, expected {expected}", record[key]))?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(base: &GenerationConfig, record: Value) -> Result<GenerationConfig> {
        base.with(record.as_object().unwrap())
    }

    fn refused(record: Value) -> String {
        let error = with(&GenerationConfig::default(), record).unwrap_err();
        assert_eq!(crate::error::exit_code(&error), 2);
        error.to_string()
    }

    #[test]
    fn what_is_out_of_range_or_without_effect_is_refused_by_name() {
        GenerationConfig::default().check().unwrap();
        for (record, names) in [
            (json!({"max_new_tokens": 0}), "max_new_tokens is 0"),
            (json!({"temperature": -0.5}), "temperature is -0.5"),
            (json!({"temperature": "nan"}), "temperature is NaN"),
            (json!({"top_p": 0}), "top_p is 0"),
            (json!({"top_p": 1.5}), "top_p is 1.5"),
            (json!({"top_p": "NaN"}), "top_p is NaN"),
            (json!({"min_p": -0.1}), "min_p is -0.1"),
            (json!({"repetition_penalty": 0}), "repetition_penalty is 0"),
            (json!({"repetition_penalty": 1e300}), "repetition_penalty is inf"),
            (json!({"num_beams": 0}), "num_beams is 0"),
            (json!({"length_penalty": "inf"}), "length_penalty is inf"),
            (json!({"num_return_sequences": 0}), "num_return_sequences is 0"),
            (json!({"stop": ["a", ""]}), "stop has an empty text"),
            (json!({"stop": "a", "num_beams": 2}), "stop is given and num_beams is 2"),
            (json!({"temperature": 0, "top_k": 5}), "give a temperature"),
            (json!({"temperature": 1, "num_beams": 2}), "num_beams is 2 and temperature is 1"),
            (json!({"num_return_sequences": 2}), "all would be equal"),
            (json!({"num_return_sequences": 3, "num_beams": 2}), "at most num_beams, 2"),
            (json!({"num_beams": 1u64 << 48}), "num_beams is 281474976710656, expected 1 to 4096"),
            (json!({"num_return_sequences": u64::MAX, "temperature": 1}), "expected 1 to 4096"),
            (json!({"stop": (vec!["a"; 257])}), "stop is a list of 257, expected 256 at most"),
            (json!({"stop": "a".repeat(4097)}), "stop has a text of 4097 bytes"),
        ] {
            let error = refused(record);
            assert!(error.contains(names), "{error}");
        }
    }

    #[test]
    fn a_record_overrides_what_it_names() {
        let base =
            GenerationConfig { stop: vec!["x".into()], max_new_tokens: 9, ..GenerationConfig::default() };
        let record = json!({
            "max_new_tokens": "7", "temperature": "0.5", "top_k": 3, "top_p": 0.25, "min_p": null,
            "stop": "\n", "repetition_penalty": 2, "length_penalty": -1, "num_return_sequences": 4,
            "seed": u64::MAX, "text": [],
        });
        let expected = GenerationConfig {
            max_new_tokens: 7,
            temperature: 0.5,
            top_k: 3,
            top_p: 0.25,
            repetition_penalty: 2.0,
            length_penalty: -1.0,
            num_return_sequences: 4,
            stop: vec!["\n".into()],
            seed: u64::MAX,
            ..GenerationConfig::default()
        };
        assert_eq!(with(&base, record).unwrap(), expected);
        assert_eq!(with(&base, json!({"stop": ["a", "b"]})).unwrap().stop, ["a", "b"]);
        assert_eq!(with(&base, json!({"stop": [], "num_beams": 3})).unwrap().stop, [""; 0]);
        assert_eq!(with(&base, json!({})).unwrap(), base);
        let placed = GenerationConfig { record: 3, ..base.clone() };
        assert_eq!(with(&placed, json!({})).unwrap().record, 3);
        assert_eq!(with(&placed, json!({"seed": null})).unwrap().record, 3);
        assert_eq!(with(&placed, json!({"seed": 1})).unwrap().record, 0, "repeats by its seed alone");
        assert_eq!(refused(json!({"top_k": [1]})), "top_k is [1], expected a whole number");
        assert_eq!(refused(json!({"seed": -1})), "seed is -1, expected a whole number");
        assert_eq!(refused(json!({"num_beams": 1.5})), "num_beams is 1.5, expected a whole number");
        assert_eq!(refused(json!({"temperature": "hot"})), "temperature is \"hot\", expected a number");
        assert_eq!(
            refused(json!({"stop": ["a", 1]})),
            "stop is [\"a\",1], expected a text or a list of texts"
        );
    }

    #[test]
    fn to_ask_for_the_best_tokens_is_to_ask_for_drawing() {
        let temperature = |base: f32, record| {
            let base = GenerationConfig { temperature: base, ..GenerationConfig::default() };
            with(&base, record).unwrap().temperature
        };
        assert_eq!(temperature(0.0, json!({"top_p": 0.9})), 1.0);
        assert_eq!(temperature(0.0, json!({"top_p": 0.9, "temperature": null})), 1.0);
        assert_eq!(temperature(0.7, json!({"min_p": 0.1})), 0.7);
        assert_eq!(temperature(0.0, json!({"top_k": 4, "temperature": 0.3})), 0.3);
        assert_eq!(temperature(0.0, json!({"top_k": 0, "top_p": 1})), 0.0, "off asks for nothing");
    }
}
