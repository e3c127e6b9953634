//! Tags of words → entities, as seqeval finds them: leniently, as conlleval.pl does, or by the scheme's rules.

use std::collections::BTreeSet;

use super::scheme::{OUTSIDE, Scheme};

/// Words of one sentence that are one entity.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entity {
    /// The type: PER.
    pub kind: String,
    /// The first word.
    pub start: usize,
    /// The word after the last.
    pub end: usize,
}

/// The entities of a sentence, as seqeval's `get_entities` finds them: what breaks a scheme's rules is repaired.
pub fn lenient<S: AsRef<str>>(tags: &[S]) -> Vec<Entity> {
    chunks(tags.iter().map(S::as_ref))
}

/// [`lenient`] for all sentences. The words are counted through all of them, with one between each two: that is
/// how seqeval goes about it, and the end of a sentence is a word outside to it.
pub(super) fn of_all(sentences: &[Vec<&str>]) -> BTreeSet<Entity> {
    let tags = sentences.iter().flat_map(|tags| tags.iter().copied().chain([OUTSIDE]));
    chunks(tags).into_iter().collect()
}

fn chunks<'a>(tags: impl Iterator<Item = &'a str>) -> Vec<Entity> {
    let mut found = Vec::new();
    let (mut last, mut last_kind, mut start) = ('O', "", 0);
    for (i, tag) in tags.chain([OUTSIDE]).enumerate() {
        let prefix = tag.chars().next().unwrap_or('O');
        let rest = &tag[tag.chars().next().map_or(0, char::len_utf8)..];
        let kind = match rest.split_once('-').map_or(rest, |(_, kind)| kind) {
            "" => "_",
            kind => kind,
        };
        if ends(last, prefix, last_kind != kind) {
            found.push(Entity { kind: last_kind.to_owned(), start, end: i });
        }
        if starts(last, prefix, last_kind != kind) {
            start = i;
        }
        (last, last_kind) = (prefix, kind);
    }
    found
}

/// seqeval's `end_of_chunk`: whether an entity ended before this word.
fn ends(last: char, prefix: char, other_kind: bool) -> bool {
    match (last, prefix) {
        ('E' | 'S', _) | ('B' | 'I', 'B' | 'S' | 'O') => true,
        _ => last != 'O' && last != '.' && other_kind,
    }
}

/// seqeval's `start_of_chunk`: whether an entity begins with this word.
fn starts(last: char, prefix: char, other_kind: bool) -> bool {
    match (last, prefix) {
        (_, 'B' | 'S') | ('E' | 'S' | 'O', 'E' | 'I') => true,
        _ => prefix != 'O' && prefix != '.' && other_kind,
    }
}

/// The entities of a sentence that keep to the scheme's rules, as seqeval's `Entities` finds them. IO is read by
/// IOB1's rules; a prefix that the scheme doesn't have is outside.
pub fn strict<S: AsRef<str>>(tags: &[S], scheme: Scheme) -> Vec<Entity> {
    let words = tags.iter().map(|tag| Word::of(tag.as_ref(), scheme));
    let words: Vec<Word> = words.chain([Word { prefix: 'O', kind: "_" }]).collect();
    let mut found = Vec::new();
    let mut last = &words[words.len() - 1];
    let mut i = 0;
    while i < words.len() {
        let start = i;
        i += 1;
        if words[start].starts(last, scheme) {
            while i < words.len() && words[i].goes_on(&words[i - 1]) {
                i += 1;
            }
            if i < words.len() && words[i].ends(&words[i - 1], scheme) {
                found.push(Entity { kind: words[start].kind.to_owned(), start, end: i });
            }
        }
        last = &words[i - 1];
    }
    found
}

/// A tag taken apart: B, I, E, S or O, and the type. L, U and M are E, S and I by other names.
struct Word<'a> {
    prefix: char,
    kind: &'a str,
}

impl<'a> Word<'a> {
    fn of(tag: &'a str, scheme: Scheme) -> Self {
        let prefix = match (tag.chars().next(), scheme) {
            (Some('E' | 'L'), Scheme::Bioes) => 'E',
            (Some('S' | 'U'), Scheme::Bioes) => 'S',
            (Some('M'), Scheme::Bioes) | (Some('I'), _) => 'I',
            (Some('B'), _) => 'B',
            _ => return Self { prefix: 'O', kind: "_" },
        };
        let kind = tag[1..].trim_matches('-');
        Self { prefix, kind: if kind.is_empty() { "_" } else { kind } }
    }

    fn starts(&self, last: &Self, scheme: Scheme) -> bool {
        let same = self.kind == last.kind;
        match (scheme, last.prefix, self.prefix) {
            (Scheme::Iob2, _, 'B') | (Scheme::Bioes, _, 'B' | 'S') => true,
            (Scheme::Iob1 | Scheme::Io, 'O' | 'B', 'I') => true,
            (Scheme::Iob1 | Scheme::Io, 'I', 'I') => !same,
            (Scheme::Iob1 | Scheme::Io, 'I' | 'B', 'B') => same,
            _ => false,
        }
    }

    fn goes_on(&self, last: &Self) -> bool {
        matches!(last.prefix, 'B' | 'I') && matches!(self.prefix, 'I' | 'E') && self.kind == last.kind
    }

    fn ends(&self, last: &Self, scheme: Scheme) -> bool {
        let same = self.kind == last.kind;
        match (scheme, last.prefix, self.prefix) {
            (Scheme::Bioes, last, _) => matches!(last, 'E' | 'S'),
            (_, 'I' | 'B', 'I') => !same,
            (_, 'I' | 'B', 'O') | (_, 'I', 'B') => true,
            (Scheme::Iob2, 'B', 'B') => true,
            (_, 'B', 'B') => same,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(found: Vec<Entity>) -> String {
        let show = |e: &Entity| format!("{} {}..{}", e.kind, e.start, e.end);
        found.iter().map(show).collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn what_breaks_the_rules_is_repaired_or_not_counted() {
        for (tags, scheme, repaired, kept) in [
            ("B-PER I-PER O I-LOC", Scheme::Iob2, "PER 0..2, LOC 3..4", "PER 0..2"),
            ("B-PER I-LOC B-LOC", Scheme::Iob2, "PER 0..1, LOC 1..2, LOC 2..3", "PER 0..1, LOC 2..3"),
            ("I-PER B-PER B-LOC", Scheme::Iob1, "PER 0..1, PER 1..2, LOC 2..3", "PER 0..1"),
            ("I-PER I-PER I-LOC", Scheme::Io, "PER 0..2, LOC 2..3", "PER 0..2, LOC 2..3"),
            ("B-PER E-PER S-PER B-PER", Scheme::Bioes, "PER 0..2, PER 2..3, PER 3..4", "PER 0..2, PER 2..3"),
            ("B-PER M-PER E-PER", Scheme::Bioes, "PER 0..3", "PER 0..3"),
            ("U-PER U-PER", Scheme::Bioes, "PER 0..2", "PER 0..1, PER 1..2"),
            ("B I O B", Scheme::Iob2, "_ 0..2, _ 3..4", "_ 0..2, _ 3..4"),
            ("B-X-", Scheme::Iob2, "X- 0..1", "X 0..1"),
            ("", Scheme::Iob2, "", ""),
        ] {
            let tags: Vec<&str> = tags.split(' ').filter(|tag| !tag.is_empty()).collect();
            assert_eq!(shown(lenient(&tags)), repaired, "{tags:?}");
            assert_eq!(shown(strict(&tags, scheme)), kept, "{tags:?}");
        }
    }
}
