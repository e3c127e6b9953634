//! How tags spell entities: IOB1, IOB2, BIOES and its sisters, IO, or not at all.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::data::records::{Files, Place};
use crate::{Result, bail_unusable};

/// The tag of a word outside every entity.
pub const OUTSIDE: &str = "O";

/// How tags spell entities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scheme {
    /// I- is inside an entity; B- begins one only where the word before is of another entity of the same type.
    Iob1,
    /// B- begins every entity, I- goes on with it.
    Iob2,
    /// B- begins an entity of several words, I- goes on, E- ends it; S- is an entity of one word. Also written
    /// with L- and U- for E- and S- (BILOU), or with M- for I- (BMES).
    Bioes,
    /// I- alone: two entities of one type side by side are one.
    Io,
    /// Tags are classes of words, as parts of speech are: there are no entities.
    None,
}

/// `--tag-scheme`: a scheme, or whichever the training data's tags are in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TagScheme {
    #[default]
    Auto,
    Iob1,
    Iob2,
    Bioes,
    Io,
    None,
}

/// The tags of one sentence, and where they stand.
#[derive(Clone, Copy, Debug)]
pub struct Tagged<'a> {
    pub tags: &'a [String],
    pub place: Place,
    /// The line of each tag, where each stands on one of its own.
    pub lines: &'a [usize],
}

impl Tagged<'_> {
    /// Where the tag of this index stands.
    pub fn place(&self, index: usize) -> Place {
        Place { line: self.lines.get(index).copied().unwrap_or(self.place.line), ..self.place }
    }
}

/// A tag and where it was first met.
#[derive(Clone, Debug)]
struct Met {
    tag: String,
    place: Place,
    /// The place, in words.
    line: String,
}

impl std::fmt::Display for Met {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{:?} ({})", self.tag, self.line)
    }
}

/// What the tags of a data set show.
#[derive(Default)]
struct Evidence {
    /// Under each prefix, the first tag.
    prefixes: BTreeMap<char, Met>,
    /// Tags that are neither O nor a prefix, a hyphen and a type.
    other: Option<Met>,
    /// Tags such as B_PER.
    separator: Option<Met>,
    /// An I- that begins an entity, and how many: IOB1.
    inside_first: Option<Met>,
    inside_firsts: usize,
    /// A B- where IOB1 has an I-, and how many: IOB2.
    begin_first: Option<Met>,
    begin_firsts: usize,
}

impl From<Scheme> for TagScheme {
    fn from(scheme: Scheme) -> Self {
        match scheme {
            Scheme::Iob1 => Self::Iob1,
            Scheme::Iob2 => Self::Iob2,
            Scheme::Bioes => Self::Bioes,
            Scheme::Io => Self::Io,
            Scheme::None => Self::None,
        }
    }
}

impl TagScheme {
    /// The scheme that was asked for; for `auto`, the one that all tags of the training data are in. IOB1 and IOB2
    /// are told apart by I- tags that begin an entity; tags with I- alone are IO.
    ///
    /// # Errors
    /// Unusable: tags that are in no scheme, or not in the one that was asked for, with the tag and its line.
    pub fn resolve<'a>(
        self,
        sentences: impl IntoIterator<Item = Tagged<'a>>,
        files: &Files,
    ) -> Result<Scheme> {
        let evidence = Evidence::of(sentences, files);
        let scheme = match self {
            Self::Auto => return evidence.scheme(),
            Self::Iob1 => Scheme::Iob1,
            Self::Iob2 => Scheme::Iob2,
            Self::Bioes => Scheme::Bioes,
            Self::Io => Scheme::Io,
            Self::None => return Ok(Scheme::None),
        };
        evidence.check(scheme)?;
        Ok(scheme)
    }
}

impl Evidence {
    fn of<'a>(sentences: impl IntoIterator<Item = Tagged<'a>>, files: &Files) -> Self {
        let mut seen = Self::default();
        for sentence in sentences {
            let mut before = None;
            for (i, tag) in sentence.tags.iter().enumerate() {
                let place = sentence.place(i);
                let met = || Met { tag: tag.clone(), place, line: files.line(place) };
                let parts = split(tag);
                match parts {
                    Some((prefix, kind)) => {
                        seen.prefixes.entry(prefix).or_insert_with(met);
                        let after_kin = before.is_some_and(|(_, other)| other == kind);
                        if prefix == 'I' && !after_kin {
                            seen.inside_firsts += 1;
                            seen.inside_first.get_or_insert_with(met);
                        }
                        if prefix == 'B' && !after_kin {
                            seen.begin_firsts += 1;
                            seen.begin_first.get_or_insert_with(met);
                        }
                    }
                    None if tag == OUTSIDE => {}
                    None => {
                        let mut letters = tag.chars();
                        let has_prefix = letters.next().is_some_and(|c| PREFIXES.contains(c));
                        let next = letters.next().is_some_and(|c| "_/:|.".contains(c));
                        if has_prefix && next && letters.next().is_some() {
                            seen.separator.get_or_insert_with(met);
                        }
                        seen.other.get_or_insert_with(met);
                    }
                }
                before = parts;
            }
        }
        seen
    }

    fn scheme(&self) -> Result<Scheme> {
        if let Some(met) = &self.separator {
            bail_unusable!(
                "the tag {met} looks like a prefix and a type, which schemes write with a hyphen, as in B-PER: \
                 rewrite the tags, or take them as plain classes with --tag-scheme none"
            );
        }
        let Some(prefixed) = self.prefixes.values().min_by_key(|met| met.place) else {
            return Ok(Scheme::None);
        };
        if let Some(met) = &self.other {
            bail_unusable!(
                "the tag {met} is neither O nor a prefix and a type, as {prefixed} is: rewrite it, or take all tags \
                 as plain classes with --tag-scheme none"
            );
        }
        let has = |prefix| self.prefixes.contains_key(&prefix);
        if "ESLUM".chars().any(has) {
            self.check(Scheme::Bioes)?;
            return Ok(Scheme::Bioes);
        }
        match (has('B'), &self.inside_first, &self.begin_first) {
            (false, ..) => Ok(Scheme::Io),
            (true, None, _) => Ok(Scheme::Iob2),
            (true, Some(_), None) => Ok(Scheme::Iob1),
            (true, Some(inside), Some(begin)) => bail_unusable!(
                "the tags are neither IOB1 nor IOB2: {} begin an entity with I-, first {inside}, and {} with B- where \
                 IOB1 has I-, first {begin}. Mend the fewer, or decide with --tag-scheme iob2 or iob1",
                self.inside_firsts,
                self.begin_firsts
            ),
        }
    }

    /// Whether every prefix is one of the scheme's.
    fn check(&self, scheme: Scheme) -> Result<()> {
        if let Some(met) = &self.other {
            bail_unusable!(
                "the tag {met} is neither O nor a prefix and a type: it is not in {}",
                scheme.name()
            );
        }
        let allowed: &[&str] = match scheme {
            Scheme::None => return Ok(()),
            Scheme::Io => &["I"],
            Scheme::Iob1 | Scheme::Iob2 => &["BI"],
            Scheme::Bioes => &["BIES", "BILU", "BMES"],
        };
        let first_stray = |set: &str| {
            let strays = self.prefixes.iter().filter(|(prefix, _)| !set.contains(**prefix));
            strays.map(|(_, met)| met).min_by_key(|met| met.place)
        };
        // the set that holds the longest
        let strays = allowed.iter().map(|set| (set, first_stray(set)));
        let nearest =
            strays.max_by_key(|(_, stray)| stray.map_or((true, Place::default()), |met| (false, met.place)));
        if let Some((set, Some(met))) = nearest {
            let prefixes: Vec<_> = set.chars().map(|prefix| format!("{prefix}-")).collect();
            bail_unusable!(
                "the tag {met} does not go with the others: {} has O and {}",
                scheme.name(),
                prefixes.join(", ")
            );
        }
        if scheme == Scheme::Bioes
            && !self.prefixes.keys().any(|prefix| "BSU".contains(*prefix))
            && let Some(met) = self.prefixes.values().min_by_key(|met| met.place)
        {
            bail_unusable!("the tag {met} is in no scheme that tk knows: nothing begins with B-, S- or U-");
        }
        Ok(())
    }
}

/// The letters that a tag of a scheme may begin with.
const PREFIXES: &str = "BIESLUM";

/// A tag's prefix and type: `B-PER` → B and PER, a lone `B` → B and nothing. `None` for O and tags of no scheme.
pub fn split(tag: &str) -> Option<(char, &str)> {
    let prefix = tag.chars().next().filter(|prefix| PREFIXES.contains(*prefix))?;
    match &tag[1..] {
        "" => Some((prefix, "")),
        rest => rest.strip_prefix('-').filter(|kind| !kind.is_empty()).map(|kind| (prefix, kind)),
    }
}

impl Scheme {
    /// As `--tag-scheme` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Iob1 => "iob1",
            Self::Iob2 => "iob2",
            Self::Bioes => "bioes",
            Self::Io => "io",
            Self::None => "none",
        }
    }

    /// The scheme of a trained model's labels, where nothing else says it. With B- and I- alone it is IOB2, which
    /// most models are in.
    pub fn of_labels<'a>(labels: impl IntoIterator<Item = &'a str>) -> Self {
        let labels: Vec<&str> = labels.into_iter().filter(|label| *label != OUTSIDE).collect();
        let prefixes: Option<Vec<char>> = labels.iter().map(|label| Some(split(label)?.0)).collect();
        match prefixes {
            None => Self::None,
            Some(prefixes) if prefixes.is_empty() => Self::None,
            Some(prefixes) if prefixes.iter().any(|prefix| "ESLUM".contains(*prefix)) => Self::Bioes,
            Some(prefixes) if prefixes.contains(&'B') => Self::Iob2,
            Some(_) => Self::Io,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn resolve(scheme: TagScheme, sentences: &[&str]) -> Result<Scheme, String> {
        let mut line = 1;
        let sentences: Vec<(Vec<String>, Vec<usize>)> = sentences
            .iter()
            .map(|tags| {
                let tags: Vec<String> = tags.split(' ').map(str::to_owned).collect();
                let lines = (line..line + tags.len()).collect();
                line += tags.len() + 1;
                (tags, lines)
            })
            .collect();
        let place = Place::default();
        let tagged = sentences.iter().map(|(tags, lines)| Tagged { tags, place, lines });
        scheme.resolve(tagged, &Path::new("x").into()).map_err(|error| error.to_string())
    }

    fn auto(sentences: &[&str]) -> Scheme {
        resolve(TagScheme::Auto, sentences).unwrap()
    }

    #[test]
    fn each_scheme_is_recognised() {
        assert_eq!(auto(&["B-PER I-PER O", "B-LOC B-LOC"]), Scheme::Iob2);
        assert_eq!(auto(&["B-PER O"]), Scheme::Iob2);
        assert_eq!(auto(&["I-PER I-PER O", "I-LOC B-LOC I-LOC"]), Scheme::Iob1);
        assert_eq!(auto(&["I-PER I-PER I-LOC O"]), Scheme::Io);
        assert_eq!(auto(&["B-PER I-PER E-PER S-LOC O"]), Scheme::Bioes);
        assert_eq!(auto(&["B-PER I-PER L-PER U-LOC O"]), Scheme::Bioes);
        assert_eq!(auto(&["B-PER M-PER E-PER S-LOC O"]), Scheme::Bioes);
        assert_eq!(auto(&["S-PER O"]), Scheme::Bioes);
        assert_eq!(auto(&["B I O"]), Scheme::Iob2);
        assert_eq!(auto(&["NOUN VERB -LRB- PRP$"]), Scheme::None);
        assert_eq!(auto(&["O PER LOC"]), Scheme::None);
    }

    #[test]
    fn an_entity_of_another_type_counts_as_a_beginning() {
        assert_eq!(auto(&["I-PER I-LOC B-LOC"]), Scheme::Iob1);
        let error = resolve(TagScheme::Auto, &["B-PER I-LOC"]).unwrap_err();
        assert!(error.contains(r#""I-LOC" (line 2)"#) && error.contains(r#""B-PER" (line 1)"#), "{error}");
    }

    #[test]
    fn a_mixture_is_refused_with_tag_and_line() {
        for (sentences, tag) in [
            (&["O B-PER", "O NOUN"][..], r#""NOUN" (line 5)"#),
            (&["B-PER E-PER", "O U-PER"], r#""U-PER" (line 5)"#),
            (&["B-PER L-PER", "S-PER O"], r#""S-PER" (line 4)"#),
            (&["B_PER O"], r#""B_PER" (line 1)"#),
            (&["I-PER E-PER"], r#""I-PER" (line 1)"#),
            (&["B- O"], ""),
        ] {
            match resolve(TagScheme::Auto, sentences) {
                Err(error) => assert!(!tag.is_empty() && error.contains(tag), "{error}"),
                Ok(scheme) => assert!(tag.is_empty() && scheme == Scheme::None, "{sentences:?}"),
            }
        }
    }

    #[test]
    fn an_asked_scheme_decides_and_is_checked() {
        assert_eq!(resolve(TagScheme::Iob2, &["I-PER O B-PER"]), Ok(Scheme::Iob2));
        assert_eq!(resolve(TagScheme::None, &["I-PER O NOUN"]), Ok(Scheme::None));
        assert!(resolve(TagScheme::Io, &["I-PER", "O B-PER"]).unwrap_err().contains(r#""B-PER" (line 4)"#));
        assert!(resolve(TagScheme::Iob2, &["B-PER E-PER"]).unwrap_err().contains(r#""E-PER" (line 2)"#));
        assert!(resolve(TagScheme::Io, &["PER"]).unwrap_err().contains("not in io"));
    }

    #[test]
    fn labels_of_a_model_show_their_scheme() {
        assert_eq!(Scheme::of_labels(["O", "B-PER", "I-PER"]), Scheme::Iob2);
        assert_eq!(Scheme::of_labels(["O", "I-PER"]), Scheme::Io);
        assert_eq!(Scheme::of_labels(["O", "S-PER", "B-PER"]), Scheme::Bioes);
        assert_eq!(Scheme::of_labels(["LABEL_0", "LABEL_1"]), Scheme::None);
        assert_eq!(Scheme::of_labels(["O"]), Scheme::None);
    }

    proptest::proptest! {
        #[test]
        fn no_tag_breaks_it(tags in proptest::collection::vec("\\PC{0,4}", 0..6), short in proptest::collection::vec("[BIESLUMO]?[-_]?[A-Zé]?", 0..6)) {
            for tags in [tags, short] {
                let files = Path::new("x").into();
                let tagged = Tagged { tags: &tags, place: Place::default(), lines: &[] };
                if let Ok(scheme) = TagScheme::Auto.resolve([tagged], &files) {
                    proptest::prop_assert!(TagScheme::from(scheme).resolve([tagged], &files).is_ok());
                    super::super::entities::strict(&tags, scheme);
                }
                super::super::entities::lenient(&tags);
                Scheme::of_labels(tags.iter().map(String::as_str));
            }
        }
    }
}
