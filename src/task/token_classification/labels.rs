//! Which label has which id.

use std::collections::BTreeSet;

use crate::{Result, bail_unusable};

/// The labels of a model, by id: those of the `base`, where it has all `tags`; else the tags, sorted as
/// transformers' `run_ner.py` sorts them, by code points.
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
    Ok(tags.into_iter().map(str::to_owned).collect())
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
        let base = owned(&["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]);
        assert_eq!(labels(["I-PER", "O"], base.clone()).unwrap(), base);
        assert_eq!(labels(["O", "B-ORG"], base).unwrap(), ["B-ORG", "O"]);
        assert!(labels(["O"], Vec::new()).is_err());
    }
}
