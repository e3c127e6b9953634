//! What records and examples are made of, for people to look at before anything is learnt.

use crate::data::records::Place;

/// A record of a file to learn from, or to measure on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Look {
    /// Where it begins.
    pub place: Place,
    /// Its texts, those that are read together as pairs.
    pub texts: Vec<(String, Option<String>)>,
    /// Its labels by their names: one, several, or a tag a word. None of a task without labels.
    pub labels: Vec<String>,
}

impl Look {
    /// One text of a record without labels.
    pub fn of_text(place: Place, text: String) -> Self {
        Self { place, texts: vec![(text, None)], labels: Vec::new() }
    }
}

/// What stands beside an example's tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum Beside {
    /// Of the whole example.
    Example(String),
    /// (T): of each token, where there is something.
    Tokens(Vec<Option<String>>),
}
