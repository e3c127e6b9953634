//! CoNLL files: a word a line with its columns, a blank line between sentences.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::BadRow;
use super::readers::{CR_ALONE, Lines, text_of};
use crate::task::token_classification::scheme::{OUTSIDE, split};
use crate::{Result, unusable};

/// One sentence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sentence {
    pub tokens: Vec<String>,
    /// A tag a token; `None` where tokens alone were asked for.
    pub tags: Option<Vec<String>>,
    /// The 1-based line of each token.
    pub lines: Vec<usize>,
}

/// Which column is the tag.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum TagColumn {
    /// Written `last`.
    #[default]
    Last,
    /// From 1.
    Number(usize),
    /// A name (none is `last`) out of a line `# global.columns = …`, or one of CoNLL-U's ten.
    Name(String),
}

impl FromStr for TagColumn {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.parse() {
            Ok(0) => Err(unusable!("column 0: columns are counted from 1, and 1 is the token")),
            Ok(number) => Ok(Self::Number(number)),
            Err(_) if text == "last" => Ok(Self::Last),
            Err(_) if text.is_empty() => Err(unusable!("a column's number or name was expected")),
            Err(_) => Ok(Self::Name(text.to_owned())),
        }
    }
}

impl TryFrom<String> for TagColumn {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<TagColumn> for String {
    fn from(column: TagColumn) -> Self {
        match column {
            TagColumn::Last => "last".to_owned(),
            TagColumn::Number(number) => number.to_string(),
            TagColumn::Name(name) => name,
        }
    }
}

const CONLL_U: [&str; 10] =
    ["ID", "FORM", "LEMMA", "UPOS", "XPOS", "FEATS", "HEAD", "DEPREL", "DEPS", "MISC"];

/// Reads sentences one by one. Memory holds one of them.
pub(super) struct Sentences {
    lines: Lines,
    column: TagColumn,
    /// Whether tags are read; without one, a token is then an error.
    tagged: bool,
    line: usize,
    /// How the first line of a token was written.
    shape: Option<Shape>,
    /// The columns' names, where a comment gives them.
    names: Option<Vec<String>>,
}

/// What all lines of tokens of a file have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    tabs: bool,
    columns: usize,
    conll_u: bool,
}

impl Sentences {
    /// Reads from `lines`. Where `tagged`, every token must have a tag; else tokens alone are
    /// read, and what else stands in the file is passed over.
    pub fn new(lines: Lines, column: TagColumn, tagged: bool) -> Self {
        Self { lines, column, tagged, line: 0, shape: None, names: None }
    }

    /// The next line, without what ends it. `Err` in it: bytes that are no text.
    fn next_line(&mut self) -> std::io::Result<Option<Result<String, BadRow>>> {
        let encoding = self.lines.encoding;
        let Some((line, bytes, end)) = self.lines.next()? else { return Ok(None) };
        self.line = line;
        Ok(Some(text_of(line, bytes, encoding).and_then(|text| {
            if line == 1 && !end.ends_with(b"\n") && text.contains('\r') {
                return Err(BadRow { line, message: CR_ALONE.to_owned() });
            }
            Ok(text.trim_end_matches(BLANK).to_owned())
        })))
    }

    fn bad(&self, message: String) -> BadRow {
        BadRow { line: self.line, message }
    }

    /// Adds a line's token to a sentence.
    fn add(&mut self, line: &str, sentence: &mut Sentence) -> Result<(), BadRow> {
        let tabs = line.contains('\t') || self.shape.is_some_and(|shape| shape.tabs);
        let columns = columns(line, tabs);
        let here = Shape {
            tabs,
            columns: columns.len(),
            conll_u: tabs && columns.len() == CONLL_U.len() && is_id(columns[0]),
        };
        let shape = *self.shape.get_or_insert(here);
        if self.tagged && here.columns == 1 {
            return Err(self.bad(format!(
                "{line:?} has no tag: a token and a tag were expected, with a tab or a space between"
            )));
        }
        // the last column is another one where some are missing; and a token with spaces needs tabs around it
        let must_agree = if self.tagged { self.column == TagColumn::Last } else { !tabs };
        if must_agree && here.columns != shape.columns {
            return Err(self.bad(format!(
                "{line:?} has {} columns, the first line of a token has {}",
                here.columns, shape.columns
            )));
        }
        let (token, tag) = self.places(shape)?;
        if shape.conll_u && columns[0].contains(['-', '.']) {
            return Ok(()); // words 1-2 together, or a word that the text leaves out: its words have own lines
        }
        let Some(token) = columns.get(token) else {
            return Err(self.bad(format!(
                "{line:?} has {} columns: no token in column {}",
                here.columns,
                token + 1
            )));
        };
        if let Some(tag) = tag {
            match columns.get(tag).map(|tag| tag.trim_matches(BLANK)) {
                None => {
                    return Err(self.bad(format!(
                        "{line:?} has {} columns: no tag in column {}",
                        here.columns,
                        tag + 1
                    )));
                }
                Some("") => return Err(self.bad(format!("{line:?} has no tag: column {} is empty", tag + 1))),
                Some(tag) => sentence.tags.get_or_insert_default().push(tag.to_owned()),
            }
        }
        sentence.tokens.push((*token).to_owned());
        sentence.lines.push(self.line);
        Ok(())
    }

    /// The columns of the token and of the tag, from 0.
    fn places(&self, shape: Shape) -> Result<(usize, Option<usize>), BadRow> {
        let conll_u = shape.conll_u.then(|| CONLL_U.map(str::to_owned).to_vec());
        let names = self.names.as_ref().or(conll_u.as_ref());
        let place = |name: &str| names.and_then(|names| names.iter().position(|known| known == name));
        let token = place("FORM").unwrap_or(0);
        if !self.tagged {
            return Ok((token, None));
        }
        let tag = match &self.column {
            TagColumn::Last if shape.conll_u && self.names.is_none() => {
                return Err(self.bad(
                    "a line of CoNLL-U: --tag-column UPOS, or another column, says which is the tag".to_owned(),
                ));
            }
            TagColumn::Last => shape.columns - 1,
            TagColumn::Number(number) => number - 1,
            TagColumn::Name(name) => place(name).ok_or_else(|| {
                self.bad(match names {
                    Some(names) => format!("no column {name:?}: they are {}", names.join(", ")),
                    None => format!(
                        "no column {name:?}: columns have names in CoNLL-U and after a line \"# global.columns = …\"; \
                         --tag-column takes numbers too"
                    ),
                })
            })?,
        };
        if tag == token {
            return Err(self.bad(format!("column {} is the token, so it can't be the tag", tag + 1)));
        }
        Ok((token, Some(tag)))
    }

    /// Whether a line that begins with `#` is a comment, as CoNLL-U has them, and no token that begins so.
    fn is_comment(&self, line: &str) -> bool {
        if !line.starts_with('#') {
            return false;
        }
        let assigns = line.starts_with("# ") && line.contains(" = ");
        if let Some((first, _)) = line.split_once('\t') {
            return first.starts_with("# ") && first.contains(" = ");
        }
        let columns = columns(line, false);
        let is_assignment = assigns && columns.get(2) == Some(&"=");
        match self.shape {
            Some(shape) if shape.tabs => true,
            Some(shape) if shape.columns == columns.len() => is_assignment,
            Some(_) => line == "#" || line.starts_with("# "),
            None if is_assignment => true,
            None => {
                let tag = columns[columns.len() - 1];
                let is_tag = columns.len() > 1 && (tag == OUTSIDE || split(tag).is_some());
                line.starts_with("# ") && !is_tag
            }
        }
    }
}

/// What separates columns and ends lines. Not Unicode's spaces: tokens hold them.
const BLANK: [char; 4] = [' ', '\t', '\r', '\n'];

fn columns(line: &str, tabs: bool) -> Vec<&str> {
    match tabs {
        true => line.split('\t').collect(),
        false => line.split(' ').filter(|column| !column.is_empty()).collect(),
    }
}

/// CoNLL-U's ID: 7, 1-2 or 8.1.
fn is_id(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit())
        && text.chars().all(|c| c.is_ascii_digit() || c == '-' || c == '.')
}

impl Iterator for Sentences {
    type Item = std::io::Result<Result<Sentence, BadRow>>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut sentence = Sentence::default();
        let mut bad = None;
        loop {
            let line = match self.next_line() {
                Err(error) => return Some(Err(error)),
                Ok(None) => break,
                Ok(Some(Err(error))) => {
                    bad.get_or_insert(error);
                    continue;
                }
                Ok(Some(Ok(line))) => line,
            };
            let is_document =
                line == "-DOCSTART-" || line.starts_with("-DOCSTART- ") || line.starts_with("-DOCSTART-\t");
            if line.is_empty() || is_document {
                if bad.is_some() || !sentence.tokens.is_empty() {
                    break;
                }
            } else if self.is_comment(&line) {
                if let Some(names) = line.strip_prefix("# global.columns =") {
                    self.names =
                        Some(names.split(' ').filter(|name| !name.is_empty()).map(str::to_owned).collect());
                }
            } else if bad.is_none() {
                bad = self.add(&line, &mut sentence).err();
            }
        }
        match bad {
            Some(bad) => Some(Ok(Err(bad))),
            None if sentence.tokens.is_empty() => None,
            None => Some(Ok(Ok(sentence))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(text: impl AsRef<[u8]>, column: TagColumn, tagged: bool) -> Sentences {
        let bytes = std::io::Cursor::new(text.as_ref().to_vec());
        Sentences::new(Lines::new(Box::new(bytes), None), column, tagged)
    }

    fn read(text: &str, column: &str, tagged: bool) -> Vec<Result<String, BadRow>> {
        let column = if column.is_empty() { TagColumn::Last } else { column.parse().unwrap() };
        let show = |s: Sentence| {
            let tags = s.tags.unwrap_or_else(|| vec![String::new(); s.tokens.len()]);
            let words = s.tokens.iter().zip(&tags).zip(&s.lines);
            words.map(|((token, tag), line)| format!("{token}/{tag}@{line}")).collect::<Vec<_>>().join(" ")
        };
        of(text, column, tagged).map(|item| item.unwrap().map(show)).collect()
    }

    fn good(text: &str, column: &str) -> Vec<String> {
        read(text, column, true).into_iter().map(Result::unwrap).collect()
    }

    #[test]
    fn tabs_or_spaces_and_any_line_end() {
        assert_eq!(
            good("\u{feff}EU\tB-ORG\r\nrejects\tO\r\n\r\n\r\nNew York\tB-LOC", ""),
            ["EU/B-ORG@1 rejects/O@2", "New York/B-LOC@5"]
        );
        assert_eq!(
            good("EU NNP I-NP I-ORG \n \nPeter  NNP I-NP I-PER\n", ""),
            ["EU/I-ORG@1", "Peter/I-PER@3"]
        );
        assert_eq!(good("1\u{a0}000 O\n", ""), ["1\u{a0}000/O@1"]);
    }

    #[test]
    fn documents_are_not_sentences() {
        let text = "-DOCSTART- -X- O O\n\nEU NNP I-NP I-ORG\n-DOCSTART- -X- O O\n\nPeter NNP I-NP I-PER\n";
        assert_eq!(good(text, ""), ["EU/I-ORG@3", "Peter/I-PER@6"]);
        assert_eq!(good("-DOCSTART-\tO\n\n-DOCSTART-x\tO\n", ""), ["-DOCSTART-x/O@3"]);
    }

    #[test]
    fn a_hash_may_be_a_token() {
        assert_eq!(good("#\tO\n# 1\tO\n#tag\tB-X\n", ""), ["#/O@1 # 1/O@2 #tag/B-X@3"]);
        assert_eq!(good("# O\n#tag O\n# B-X\n", ""), ["#/O@1 #tag/O@2 #/B-X@3"]);
        assert_eq!(good("# # I-NP O\n# x = y\n", ""), ["#/O@1"]);
    }

    #[test]
    fn comments_are_skipped() {
        let text = "# newdoc id = a\n# sent_id = 1\n# text = # 1\na\tO\n# newpar\n#\n# text = a\tb\nb\tO\n";
        assert_eq!(good(text, ""), ["a/O@4 b/O@8"]);
        assert_eq!(good("# a note about this\na O\n\n# text = a b\nb O\n", ""), ["a/O@2", "b/O@5"]);
        assert_eq!(read("# text = a b\na\nb\n#\n", "", false), [Ok("a/@2 b/@3 #/@4".to_owned())]);
    }

    #[test]
    fn the_tag_column_is_a_number_or_a_name() {
        assert_eq!(good("EU NNP I-NP I-ORG\n", "2"), ["EU/NNP@1"]);
        let plus = "# global.columns = ID FORM NER\n1\tEU\tB-ORG\n";
        assert_eq!(good(plus, "NER"), ["EU/B-ORG@2"]);
        assert_eq!(good(plus, ""), ["EU/B-ORG@2"]);
        let u = "1-2\tdu\t_\t_\t_\t_\t_\t_\t_\t_\n1\tde\tde\tADP\t_\t_\t_\t_\t_\t_\n2\tle\tle\tDET\t_\t_\t_\t_\t_\t_\n";
        assert_eq!(good(u, "UPOS"), ["de/ADP@2 le/DET@3"]);
        assert!(read(u, "", true)[0].as_ref().unwrap_err().message.contains("--tag-column UPOS"));
        assert_eq!(read(u, "", false), [Ok("de/@2 le/@3".to_owned())]);
        for (text, column, what) in [
            ("a O\n", "3", "no tag in column 3"),
            ("a O\n", "1", "is the token"),
            ("a O\n", "NER", "takes numbers too"),
            (plus, "POS", "they are ID, FORM, NER"),
        ] {
            let error = read(text, column, true)[0].clone().unwrap_err();
            assert!(error.message.contains(what), "{error}");
        }
        assert!("0".parse::<TagColumn>().is_err());
    }

    #[test]
    fn a_line_without_a_tag_is_an_error_with_its_line() {
        let read = |text| read(text, "", true);
        assert_eq!(read("a\tO\nb\nc\tO\n\nd\tO\n")[1], Ok("d/O@5".to_owned()));
        for (text, line, what) in [
            ("a\tO\nb\t\n", 2, "no tag"),
            ("a\n", 1, "no tag"),
            ("a O\n\nNew York B-LOC\n", 3, "3 columns, the first line of a token has 2"),
            ("a\tO\nb O\n", 2, "no tag"),
            ("a DT O\nb NN\n", 2, "2 columns, the first line of a token has 3"),
        ] {
            let error = read(text).into_iter().find_map(Result::err).unwrap();
            assert!(error.line == line && error.message.contains(what), "{error}");
        }
        let bytes: &[u8] = b"a\tO\n\xff\tO\n\nb\tO\n";
        let read: Vec<_> = of(bytes, TagColumn::Last, true).map(Result::unwrap).collect();
        assert_eq!(read[0].as_ref().unwrap_err().line, 2);
        assert!(read[1].is_ok());
    }

    #[test]
    fn an_empty_token_keeps_its_tag() {
        assert_eq!(good("a\tO\n\tO\nb\tO\n", ""), ["a/O@1 /O@2 b/O@3"]);
    }

    #[test]
    fn predictions_need_no_tags() {
        assert_eq!(
            read("Paris\nis\n\nBerlin\n", "", false),
            [Ok("Paris/@1 is/@2".into()), Ok("Berlin/@4".into())]
        );
        assert_eq!(read("Paris\tB-LOC\nNew York\n", "", false), [Ok("Paris/@1 New York/@2".into())]);
        let error = read("Paris\nNew York\n", "", false)[0].clone().unwrap_err();
        assert!(error.line == 2 && error.message.contains("2 columns"), "{error}");
        assert_eq!(read("", "", true), []);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            sentences in prop::collection::vec(prop::collection::vec(("[^\t\r\n\0]{0,5}", "[A-Z][A-Z_-]{0,4}"), 1..6), 1..5),
            end in prop::sample::select(vec!["\n", "\r\n"]),
        ) {
            let mut text = String::new();
            for words in &sentences {
                for (token, tag) in words {
                    text += &format!("{token}\t{tag}{end}");
                }
                text += end;
            }
            // what the format itself gives a meaning to
            let special = |token: &str| {
                token.starts_with('\u{feff}') || token == "-DOCSTART-" || token.starts_with("# ")
            };
            prop_assume!(!sentences.iter().flatten().any(|(token, _)| special(token)));
            let read: Vec<_> = of(&text, TagColumn::Last, true).map(|item| item.unwrap().unwrap()).collect();
            let read: Vec<Vec<(String, String)>> =
                read.into_iter().map(|s| s.tokens.into_iter().zip(s.tags.unwrap()).collect()).collect();
            prop_assert_eq!(read, sentences);
        }

        #[test]
        fn no_bytes_break_it(bytes: Vec<u8>, parts in prop::collection::vec("[#\t ABO=0-9.\n-]{0,9}", 0..9), tagged: bool) {
            for bytes in [bytes, parts.join("\n").into_bytes()] {
                for sentence in of(&bytes, TagColumn::Last, tagged) {
                    if let Ok(Ok(sentence)) = sentence {
                        prop_assert_eq!(sentence.lines.len(), sentence.tokens.len());
                        prop_assert_eq!(sentence.tags.map(|tags| tags.len()), tagged.then_some(sentence.tokens.len()));
                    }
                }
            }
        }
    }
}
