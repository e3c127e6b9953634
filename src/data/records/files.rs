//! What a command line names (files, patterns, folders) → files that are read one behind the other, as one.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use glob::{MatchOptions, Pattern};
use walkdir::{DirEntry, WalkDir};

use super::{BadRow, EMPTY_LINE, Format, How, Row, Rows, Source};
use crate::{Result, bail_unusable, unusable};

/// What a pattern has, and few names.
const WILD: [char; 3] = ['*', '?', '['];

/// Files of records, in the order in which they are read. There is one at least.
#[derive(Clone, Debug, PartialEq)]
pub struct Files {
    paths: Vec<PathBuf>,
    /// Whether each record is read, by its number; all are where there is nothing.
    kept: Option<Arc<[bool]>>,
    /// Those that were read before, where these stand for all.
    held: Option<Arc<[Numbered]>>,
}

/// What stands in the place of a record.
#[derive(Clone, Debug, PartialEq)]
pub struct Numbered {
    /// Its number among all of the files', read or not, from 0.
    pub number: usize,
    /// Which of the files it stands in.
    pub file: usize,
    pub row: Result<Row, BadRow>,
}

/// Where a record stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Which of the files, from 0.
    pub file: usize,
    /// As in [`super::Row`].
    pub line: usize,
}

impl From<&Path> for Files {
    fn from(path: &Path) -> Self {
        Self { paths: vec![path.to_owned()], kept: None, held: None }
    }
}

impl From<&PathBuf> for Files {
    fn from(path: &PathBuf) -> Self {
        path.as_path().into()
    }
}

/// The file's path, or the first one's and how many others there are.
impl std::fmt::Display for Files {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let first = self.paths[0].display();
        match self.paths.len() - 1 {
            0 => first.fmt(f),
            1 => write!(f, "{first} and another file"),
            others => write!(f, "{first} and {others} other files"),
        }
    }
}

impl Files {
    /// The files that names stand for: a file's own; a folder's, all those below it whose extension is a format's (with
    /// `format`, all), less those whose name, or whose folder's name, begins with `.` or `_`; a pattern's (`data/*.jsonl`,
    /// `data/**/*.csv.gz`), unless a file has that name. What one name stands for is sorted.
    ///
    /// # Errors
    /// Unusable: a pattern or a folder without files, a folder that can't be read, a file that is named twice.
    pub fn named(names: &[PathBuf], format: Option<Format>) -> Result<Self> {
        let mut paths = Vec::new();
        for name in names {
            let mut own = match name.to_str().filter(|name| name.contains(WILD)) {
                _ if name.is_dir() => below(name, format)?,
                Some(pattern) if name.symlink_metadata().is_err() => matches(pattern)?,
                _ => vec![name.clone()],
            };
            own.sort();
            paths.append(&mut own);
        }
        let mut known: HashMap<PathBuf, &PathBuf> = HashMap::new();
        for path in &paths {
            // what is not there is told when it is opened
            let Ok(real) = path.canonicalize() else { continue };
            if let Some(before) = known.insert(real, path) {
                let also =
                    if before == path { String::new() } else { format!(", as {}, too", before.display()) };
                bail_unusable!("{} is named twice{also}: its records would count double", path.display());
            }
        }
        if paths.is_empty() {
            bail_unusable!("no file of records is named");
        }
        Ok(Self { paths, kept: None, held: None })
    }

    /// Each file.
    pub fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// The same, as they are.
    pub fn all(&self) -> Vec<&Path> {
        self.paths.iter().map(PathBuf::as_path).collect()
    }

    /// The same files, of which these records alone are read, by their numbers.
    pub fn keeping(&self, records: Vec<bool>) -> Self {
        Self { paths: self.paths.clone(), kept: Some(records.into()), held: None }
    }

    /// The same files, of which these records, that [`Files::read`] gave, are all there is.
    pub fn holding(&self, records: Vec<Numbered>) -> Self {
        Self { paths: self.paths.clone(), kept: None, held: Some(records.into()) }
    }

    /// How many records there are, where some of them are not read.
    pub fn drawn_from(&self) -> Option<usize> {
        self.kept.as_ref().map(|kept| kept.len())
    }

    /// The records, in order. After an error nothing follows.
    pub fn read<'a>(&'a self, how: &'a How) -> impl Iterator<Item = Result<Numbered>> + Send + 'a {
        Reading {
            files: self,
            how,
            file: 0,
            rows: None,
            number: 0,
            empty: Vec::new(),
            ready: VecDeque::new(),
        }
    }

    /// A record's file and line, as `data/a.jsonl:7`.
    pub fn at(&self, place: Place) -> String {
        format!("{}:{}", self.paths[place.file].display(), place.line)
    }

    /// Its line, and its file where there are several: `line 7 of data/a.jsonl`.
    pub fn line(&self, place: Place) -> String {
        match self.paths.len() {
            1 => format!("line {}", place.line),
            _ => format!("line {} of {}", place.line, self.paths[place.file].display()),
        }
    }
}

/// The records of files, from one to the next. Empty lines at a file's end are none.
struct Reading<'a> {
    files: &'a Files,
    how: &'a How,
    file: usize,
    /// Of the file, once it is open.
    rows: Option<Rows>,
    number: usize,
    /// Empty lines that nothing stands behind yet.
    empty: Vec<Numbered>,
    /// What was read and not yet given.
    ready: VecDeque<Numbered>,
}

impl Reading<'_> {
    fn step(&mut self) -> Result<Option<Numbered>> {
        if let Some(held) = &self.files.held {
            self.number += 1;
            return Ok(held.get(self.number - 1).cloned());
        }
        while self.ready.is_empty() && self.file < self.files.paths.len() {
            self.read()?;
        }
        Ok(self.ready.pop_front())
    }

    /// Reads a record, or passes over one, or goes on to the next file.
    fn read(&mut self) -> Result<()> {
        let rows = match &mut self.rows {
            Some(rows) => rows,
            none => none.insert(super::read(&Source::Path(self.files.paths[self.file].clone()), self.how)?),
        };
        let (number, file) = (self.number, self.file);
        let is_kept = self.files.kept.as_ref().is_none_or(|kept| kept.get(number) == Some(&true));
        let row = if is_kept {
            rows.next().transpose()?.map(Some)
        } else {
            rows.pass_over().transpose()?.map(|()| None)
        };
        match row {
            Some(Some(Err(bad))) if bad.message == EMPTY_LINE => {
                self.empty.push(Numbered { number, file, row: Err(bad) });
            }
            Some(row) => {
                self.ready.extend(self.empty.drain(..));
                let row = row.map(|row| row.map(|row| Row { file, ..row }));
                self.ready.extend(row.map(|row| Numbered { number, file, row }));
            }
            None => {
                self.empty.clear();
                (self.file, self.rows) = (file + 1, None);
                return Ok(());
            }
        }
        self.number += 1;
        Ok(())
    }
}

impl Iterator for Reading<'_> {
    type Item = Result<Numbered>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self.step().transpose();
        if matches!(step, Some(Err(_))) {
            self.file = self.files.paths.len(); // nothing follows
        }
        step
    }
}

/// The files of records below a folder. Links are followed, and each folder is looked into once.
fn below(folder: &Path, format: Option<Format>) -> Result<Vec<PathBuf>> {
    let (mut paths, mut seen) = (Vec::new(), HashSet::new());
    let is_new = |entry: &DirEntry| {
        let is_shown = entry.depth() == 0 || !is_hidden(entry.path());
        // what can't be resolved can't be read either, which is told
        let folder = entry.file_type().is_dir().then(|| entry.path().canonicalize().ok()).flatten();
        is_shown && folder.is_none_or(|folder| seen.insert(folder))
    };
    for entry in WalkDir::new(folder).follow_links(true).sort_by_file_name().into_iter().filter_entry(is_new)
    {
        match entry {
            Ok(entry) => {
                let path = entry.path();
                if entry.file_type().is_file() && (format.is_some() || Format::of(path).is_ok()) {
                    paths.push(path.to_owned());
                }
            }
            // a link to a folder that it stands in leads to nothing new
            Err(error) if error.loop_ancestor().is_some() || error.path().is_some_and(is_hidden) => {}
            Err(error) => return Err(unusable!("{}: {error}", folder.display())),
        }
    }
    if paths.is_empty() {
        bail_unusable!(
            "{} is a folder without a file of records: the known formats are {}, packed or not (.gz, .zst); names that \
             begin with . or _ are left out",
            folder.display(),
            super::known()
        );
    }
    Ok(paths)
}

/// Whether a file or folder is not data, by its name, as `datasets` has it.
fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(['.', '_']))
}

/// The files that a pattern matches. As in a shell, `*` does not match a name that begins with a dot, and `**` follows no
/// links to folders.
fn matches(pattern: &str) -> Result<Vec<PathBuf>> {
    let is_plain = |part: &Component| !part.as_os_str().to_string_lossy().contains(WILD);
    // the folder in front of the first wild part; "./" and doubled slashes are dropped
    let folder: PathBuf = Path::new(pattern).components().take_while(is_plain).collect();
    let whole: PathBuf = Path::new(pattern).components().collect();
    let options = MatchOptions {
        require_literal_leading_dot: true,
        require_literal_separator: true,
        ..Default::default()
    };
    let wild = Pattern::new(&whole.to_string_lossy())
        .map_err(|error| unusable!("{pattern}: neither a file's name nor a pattern: {error}"))?;
    let is_deep = pattern.contains("**");
    let depth = if is_deep { usize::MAX } else { whole.components().count() - folder.components().count() };
    let top = if folder.as_os_str().is_empty() { Path::new(".") } else { &folder };
    let mut paths = Vec::new();
    for entry in WalkDir::new(top).follow_links(!is_deep).min_depth(1).max_depth(depth) {
        let named = |path: &Path| path.strip_prefix(".").unwrap_or(path).to_owned();
        match entry {
            Ok(entry) => {
                let path =
                    if folder.as_os_str().is_empty() { named(entry.path()) } else { entry.into_path() };
                if !path.is_dir() && wild.matches_path_with(&path, options) {
                    paths.push(path);
                }
            }
            Err(error) if error.loop_ancestor().is_some() => {}
            // nothing that is there, unless it was asked for
            Err(error)
                if is_missing(&error)
                    && !error.path().is_some_and(|path| wild.matches_path_with(&named(path), options)) => {}
            Err(error) => return Err(unusable!("{pattern}: {error}")),
        }
    }
    if paths.is_empty() {
        bail_unusable!("{pattern} matches no file");
    }
    Ok(paths)
}

fn is_missing(error: &walkdir::Error) -> bool {
    error.io_error().is_some_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new(names: &[&str]) -> Self {
            let folder = Self(tempfile::tempdir().unwrap());
            for name in names {
                let path = folder.path(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, "x\n").unwrap();
            }
            folder
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn short(&self, text: impl std::fmt::Display) -> String {
            text.to_string().replace(&format!("{}/", self.0.path().display()), "")
        }

        fn named(&self, names: &[&str], format: Option<Format>) -> Result<Vec<String>, String> {
            let names: Vec<PathBuf> = names.iter().map(|name| self.path(name)).collect();
            match Files::named(&names, format) {
                Ok(files) => Ok(files.paths.iter().map(|path| self.short(path.display())).collect()),
                Err(error) => {
                    assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
                    Err(self.short(format!("{error:#}")))
                }
            }
        }
    }

    #[test]
    fn a_folder_is_its_files_of_records_in_the_order_of_their_names() {
        let folder = Folder::new(&[
            "data/b.jsonl",
            "data/a/z.csv.gz",
            "data/a/deep/er.conll",
            "data/a.txt.zst",
            "data/README.md",
            "data/picture.png",
            "data/.hidden.jsonl",
            "data/_SUCCESS",
            "data/_draft.jsonl",
            "data/.cache/c.jsonl",
            "data/__pycache__/d.json",
            "data/x.gz",
        ]);
        let wanted = ["data/a/deep/er.conll", "data/a/z.csv.gz", "data/a.txt.zst", "data/b.jsonl"];
        assert_eq!(folder.named(&["data"], None).unwrap(), wanted);
        let with_format = folder.named(&["data"], Some(Format::Txt)).unwrap();
        assert!(with_format.contains(&"data/README.md".into()), "{with_format:?}");
        assert!(!with_format.iter().any(|name| name.contains("hidden") || name.contains('_')));
        // what is asked for by its name is not hidden
        assert_eq!(folder.named(&["data/_draft.jsonl"], None).unwrap(), ["data/_draft.jsonl"]);
        let said = Folder::new(&["docs/README.md", "docs/_a.jsonl"]).named(&["docs"], None).unwrap_err();
        assert!(
            said.starts_with("docs is a folder without a file of records: the known formats are jsonl, ")
        );
    }

    #[test]
    fn a_pattern_is_what_it_matches_unless_a_file_has_its_name() {
        let folder =
            Folder::new(&["b.jsonl", "a.jsonl", "c.csv", "d/e.jsonl", ".f.jsonl", "[ab].jsonl", "g?.txt"]);
        let named = |name| folder.named(&[name], None);
        assert_eq!(named("*.jsonl").unwrap(), ["[ab].jsonl", "a.jsonl", "b.jsonl"]);
        assert_eq!(named("**/e.jsonl").unwrap(), ["d/e.jsonl"]);
        assert_eq!(named("[ab].jsonl").unwrap(), ["[ab].jsonl"]);
        assert_eq!(named("./d//e.*").unwrap(), ["d/e.jsonl"]);
        assert_eq!(named("none/*.jsonl").unwrap_err(), "none/*.jsonl matches no file");
        assert_eq!(named("[bc].*").unwrap(), ["b.jsonl", "c.csv"]);
        assert_eq!(named("g?.txt").unwrap(), ["g?.txt"]);
        assert_eq!(named("*.parquet").unwrap_err(), "*.parquet matches no file");
        assert_eq!(named("d*").unwrap_err(), "d* matches no file");
        let said = named("a**b").unwrap_err();
        assert!(said.contains("a**b: neither a file's name nor a pattern: "), "{said}");
        // told when it is opened
        assert_eq!(named("none.jsonl").unwrap(), ["none.jsonl"]);
    }

    #[test]
    fn names_keep_their_order_and_no_file_counts_twice() {
        let folder = Folder::new(&["b.txt", "a.txt", "d/c.txt"]);
        assert_eq!(folder.named(&["d", "b.txt", "a.txt"], None).unwrap(), ["d/c.txt", "b.txt", "a.txt"]);
        let twice = |names: &[&str]| folder.named(names, None).unwrap_err();
        assert!(twice(&["a.txt", "a.txt"]).starts_with("a.txt is named twice: its records"));
        assert!(twice(&["a.txt", "*.txt"]).starts_with("a.txt is named twice: its records"));
        assert!(twice(&["a.txt", "d/../a.txt"]).starts_with("d/../a.txt is named twice, as a.txt, too"));
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink(folder.path("a.txt"), folder.path("link.txt")).unwrap();
            assert!(twice(&["a.txt", "link.txt"]).starts_with("link.txt is named twice, as a.txt, too"));
        }
    }

    #[test]
    #[cfg(unix)]
    fn links_are_followed_and_a_circle_of_them_ends() {
        use std::os::unix::fs::symlink;
        let folder = Folder::new(&["data/a.txt", "blobs/3f2a", "more/b.txt"]);
        symlink(folder.path("data"), folder.path("data/circle")).unwrap();
        symlink(folder.path("blobs/3f2a"), folder.path("data/c.txt")).unwrap();
        symlink(folder.path("more"), folder.path("data/more")).unwrap();
        symlink("nowhere", folder.path("data/.#lock.txt")).unwrap();
        assert_eq!(folder.named(&["data"], None).unwrap(), ["data/a.txt", "data/c.txt", "data/more/b.txt"]);
        assert_eq!(folder.named(&["data/*/*.txt"], None).unwrap(), ["data/more/b.txt"]);
        // circles that lead out of the folder, and from folder to folder: of many ways none is gone twice
        for i in 0..20 {
            std::fs::create_dir(folder.path(&format!("data/d{i}"))).unwrap();
            for j in 0..20 {
                symlink(folder.path(&format!("data/d{j}")), folder.path(&format!("data/d{i}/to{j}")))
                    .unwrap();
            }
        }
        symlink("..", folder.path("data/up")).unwrap();
        let named = folder.named(&["data"], None).unwrap();
        assert_eq!(named, ["data/a.txt", "data/c.txt", "data/more/b.txt"]);
        assert_eq!(folder.named(&["data/**/*.txt"], None).unwrap(), ["data/a.txt", "data/c.txt"]);
        symlink("nowhere", folder.path("data/lost.txt")).unwrap();
        let said = folder.named(&["data"], None).unwrap_err();
        assert!(said.contains("lost.txt"), "{said}");
    }

    #[test]
    fn a_place_is_told_with_its_file() {
        let of = |names: &[&str]| Files {
            paths: names.iter().map(PathBuf::from).collect(),
            kept: None,
            held: None,
        };
        let place = Place { file: 0, line: 7 };
        assert_eq!(of(&["a.txt"]).to_string(), "a.txt");
        assert_eq!(
            (of(&["a.txt"]).at(place), of(&["a.txt"]).line(place)),
            ("a.txt:7".into(), "line 7".into())
        );
        let three = of(&["a.txt", "b.txt", "c.txt"]);
        assert_eq!(three.to_string(), "a.txt and 2 other files");
        assert_eq!(of(&["a.txt", "b.txt"]).to_string(), "a.txt and another file");
        assert_eq!(three.line(Place { file: 2, line: 1 }), "line 1 of c.txt");
    }
}
