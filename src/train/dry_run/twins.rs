//! Records that say the same: exactly, or but for case, punctuation and spaces.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::{Serialize, Serializer};

use crate::data::records::Place;
use crate::task::Look;

/// Records with the texts of another one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Twins {
    /// The same texts.
    pub exact: usize,
    /// The same but for case, punctuation and spaces.
    pub alike: usize,
    /// Of both, those that have other labels.
    pub labelled_otherwise: usize,
    /// The lines of the first of them and of the record that it is like.
    #[serde(serialize_with = "lines")]
    pub first: Option<(Place, Place)>,
}

impl Twins {
    /// How many there are.
    pub fn all(&self) -> usize {
        self.exact + self.alike
    }

    /// Counts a record that is like another one.
    fn count(&mut self, record: &Look, twin: &Look, exact: bool) {
        *(if exact { &mut self.exact } else { &mut self.alike }) += 1;
        self.labelled_otherwise += usize::from(record.labels != twin.labels);
        self.first.get_or_insert((record.place, twin.place));
    }
}

fn lines<S: Serializer>(first: &Option<(Place, Place)>, serializer: S) -> Result<S::Ok, S::Error> {
    first.map(|(record, twin)| (record.line, twin.line)).serialize(serializer)
}

/// Records by what they say.
#[derive(Default)]
pub struct Known<'a> {
    exact: HashMap<u64, &'a Look>,
    alike: HashMap<u64, &'a Look>,
}

impl<'a> Known<'a> {
    /// Records, and those of them that say what an earlier one says.
    pub fn of(records: &'a [Look]) -> (Self, Twins) {
        let (mut known, mut twins) = (Self::default(), Twins::default());
        for record in records {
            let (exact, alike) = hashes(record);
            known.look_up(record, (exact, alike), &mut twins);
            known.exact.entry(exact).or_insert(record);
            known.alike.entry(alike).or_insert(record);
        }
        (known, twins)
    }

    /// Those of other files' records that say what one of these says.
    pub fn shared_with(&self, records: &[Look]) -> Twins {
        let mut twins = Twins::default();
        for record in records {
            self.look_up(record, hashes(record), &mut twins);
        }
        twins
    }

    /// Counts a record that one of these is like.
    fn look_up(&self, record: &Look, (exact, alike): (u64, u64), twins: &mut Twins) {
        match (self.exact.get(&exact), self.alike.get(&alike)) {
            (Some(twin), _) => twins.count(record, twin, true),
            (None, Some(twin)) => twins.count(record, twin, false),
            (None, None) => {}
        }
    }
}

/// Of the texts as they are, and of what is alike in texts that differ in case, punctuation and spaces alone.
fn hashes(record: &Look) -> (u64, u64) {
    let (mut exact, mut alike) = (DefaultHasher::new(), DefaultHasher::new());
    record.texts.hash(&mut exact);
    for (text, pair) in &record.texts {
        words(text).hash(&mut alike);
        pair.as_deref().map(words).hash(&mut alike);
    }
    (exact.finish(), alike.finish())
}

/// Letters and digits in lower case, with a space between words; a text without any as it is.
fn words(text: &str) -> String {
    let mut words = String::with_capacity(text.len());
    for word in text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
        if !words.is_empty() {
            words.push(' ');
        }
        words.extend(word.chars().flat_map(char::to_lowercase));
    }
    if words.is_empty() { text.to_owned() } else { words }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(line: usize) -> Place {
        Place { file: 0, line }
    }

    fn looks(texts: &[(&str, &str)]) -> Vec<Look> {
        let look = |(line, (text, label)): (usize, &(&str, &str))| Look {
            place: at(line + 1),
            texts: vec![((*text).to_owned(), None)],
            labels: vec![(*label).to_owned()],
        };
        texts.iter().enumerate().map(look).collect()
    }

    #[test]
    fn records_that_say_the_same_are_counted_once_each_with_what_is_labelled_otherwise() {
        let train = looks(&[
            ("A good film!", "pos"),
            ("bad", "neg"),
            ("a  good film", "pos"),
            ("A good film!", "neg"),
            ("😀", "pos"),
            ("😢", "neg"),
        ]);
        let (known, twins) = Known::of(&train);
        assert_eq!(twins, Twins { exact: 1, alike: 1, labelled_otherwise: 1, first: Some((at(3), at(1))) });
        let eval = looks(&[("BAD.", "neg"), ("bad", "pos"), ("worse", "neg"), ("A good film!", "pos")]);
        let shared = known.shared_with(&eval);
        assert_eq!(shared, Twins { exact: 2, alike: 1, labelled_otherwise: 1, first: Some((at(1), at(2))) });
    }

    #[test]
    fn a_pair_is_not_the_pair_the_other_way_round() {
        let pair = |a: &str, b: &str| Look {
            place: at(1),
            texts: vec![(a.to_owned(), Some(b.to_owned()))],
            labels: Vec::new(),
        };
        let (known, _) = Known::of(std::slice::from_ref(Box::leak(Box::new(pair("a", "b")))));
        assert_eq!(known.shared_with(&[pair("b", "a"), pair("A", "B"), pair("a b", "")]).all(), 1);
    }
}
