//! Which label has which id.

use std::collections::BTreeSet;

use crate::task::id2label::in_order;
use crate::{Result, bail_unusable};

/// The labels of a model, by id: those of the `base`, where it has all `tags`; else the tags in order, by number where all
/// are integers, else by text, as transformers' `run_ner.py` has them.
///
/// # Errors
/// Unusable: fewer than two different tags, where the base doesn't have them all.
pub fn labels<'a>(tags: impl IntoIterator<Item = &'a str>, base: Vec<String>) -> Result<Vec<String>> {
    let tags: BTreeSet<&str> = tags.into_iter().collect();
    if base.len() > 1 && tags.iter().all(|tag| base.iter().any(|label| label == tag)) {
        return Ok(base);
    }
    if tags.len() < 2 {
        bail_unusable!("the training data has the tags {tags:?}: at least 2 different ones are needed");
    }
    Ok(in_order(tags.into_iter().map(str::to_owned).collect()))
}

/// The label of a word's later tokens, by the label of the word: I- for a B- that has an I- of its type, else the same, as
/// transformers' `run_ner.py` has it.
pub fn inside(labels: &[String]) -> Vec<u32> {
    let inside = |label: &String| {
        let kind = label.strip_prefix("B-")?;
        labels.iter().position(|other| other.strip_prefix("I-") == Some(kind))
    };
    (0..).zip(labels).map(|(id, label)| inside(label).map_or(id, |inside| inside as u32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(labels: &[&str]) -> Vec<String> {
        labels.iter().map(|label| (*label).to_owned()).collect()
    }

    #[test]
    fn tags_are_sorted_or_keep_the_bases_order() {
        let tags = ["O", "B-PER", "I-PER", "O", "B-ÄRA", "B-a"];
        assert_eq!(labels(tags, Vec::new()).unwrap(), ["B-PER", "B-a", "B-ÄRA", "I-PER", "O"]);
        let integers = ["10", "9", "0", "-1", "10"];
        assert_eq!(labels(integers, Vec::new()).unwrap(), ["-1", "0", "9", "10"]);
        let base = owned(&["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]);
        assert_eq!(labels(["I-PER", "O"], base.clone()).unwrap(), base);
        assert_eq!(labels(["O", "B-ORG"], base).unwrap(), ["B-ORG", "O"]);
        assert!(labels(["O"], Vec::new()).is_err());
    }

    #[test]
    fn behind_a_words_first_token_an_entity_goes_on() {
        let labels = owned(&["B-LOC", "I-PER", "O", "B-PER", "B-", "I-LOC", "b-per"]);
        assert_eq!(inside(&labels), [5, 1, 2, 1, 4, 5, 6]);
    }
}
