//! A row and a wanted field → its value, or an error that says what stands there instead.

use serde_json::Value;

use super::{BadRow, Row};

/// How many columns an error lists.
const LISTED: usize = 10;

/// The key of what stands in place of a value that can't be read; its value is the type in the file.
pub(super) const UNREADABLE: &str = "unreadable type of Parquet";

/// The type of a value that can't be read.
fn unreadable(value: &Value) -> Option<&str> {
    value.get(UNREADABLE)?.as_str()
}

/// Under which column a wanted field stands in the user's file.
#[derive(Clone, Debug, Default)]
pub struct Columns(Vec<(&'static str, Option<String>)>);

impl Columns {
    /// Adds a field that a flag can map: `text_pair` by `--text-pair-column`. `None`: the flag was not given.
    pub fn with(mut self, wanted: &'static str, column: Option<String>) -> Self {
        self.0.push((wanted, column));
        self
    }

    /// The column of a wanted field; its own name where nothing else was asked for.
    pub fn of<'a>(&'a self, wanted: &'a str) -> &'a str {
        self.asked(wanted).unwrap_or(wanted)
    }

    /// Each wanted field with its column.
    pub fn all(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.0.iter().map(|(wanted, _)| (*wanted, self.of(wanted)))
    }

    fn asked(&self, wanted: &str) -> Option<&str> {
        self.0.iter().find(|(name, _)| *name == wanted)?.1.as_deref()
    }

    /// What to say of the flag when the column is missing.
    fn hint(&self, wanted: &str) -> String {
        let flag = format!("--{}-column", wanted.replace('_', "-"));
        match self.0.iter().find(|(name, _)| *name == wanted) {
            Some((_, Some(_))) => format!(" ({flag} asks for it)"),
            Some((_, None)) => format!(" ({flag} names another)"),
            None => String::new(),
        }
    }
}

impl Row {
    /// A field that may be absent or null.
    pub fn get(&self, columns: &Columns, wanted: &str) -> Option<&Value> {
        self.fields.get(columns.of(wanted)).filter(|value| !value.is_null())
    }

    /// A field that must be there.
    pub fn value(&self, columns: &Columns, wanted: &str) -> Result<&Value, BadRow> {
        self.get(columns, wanted).ok_or_else(|| self.missing(columns, wanted))
    }

    /// A field that must be a list of strings.
    pub fn words(&self, columns: &Columns, wanted: &str) -> Result<Vec<String>, BadRow> {
        let word = |value: &Value| value.as_str().map(str::to_owned);
        self.list(columns, wanted, "strings", word)
    }

    /// A field that must be a list of names or integers, as text.
    pub fn labels(&self, columns: &Columns, wanted: &str) -> Result<Vec<String>, BadRow> {
        self.list(columns, wanted, "names or integers", |value| match value {
            Value::String(name) if !name.trim().is_empty() => Some(name.clone()),
            Value::Number(id) if id.is_i64() || id.is_u64() => Some(id.to_string()),
            _ => None,
        })
    }

    fn list(
        &self,
        columns: &Columns,
        wanted: &str,
        kind: &str,
        read: impl Fn(&Value) -> Option<String>,
    ) -> Result<Vec<String>, BadRow> {
        let value = self.value(columns, wanted)?;
        let place = || format!("field {:?}", columns.of(wanted));
        let list = value.as_array().ok_or_else(|| {
            self.bad(format!("{} is {}; a list of {kind} was expected", place(), describe(value)))
        })?;
        let read = |value| {
            read(value).ok_or_else(|| self.bad(format!("{} holds {value}; {kind} were expected", place())))
        };
        list.iter().map(read).collect()
    }

    /// A field that must be a string.
    pub fn text(&self, columns: &Columns, wanted: &str) -> Result<&str, BadRow> {
        let value = self.value(columns, wanted)?;
        value.as_str().ok_or_else(|| {
            let column = columns.of(wanted);
            self.bad(format!("field {column:?} is {}; a string was expected", describe(value)))
        })
    }

    /// A string that may be absent or null. A column that a flag asks for must stand in the row.
    pub fn optional_text(&self, columns: &Columns, wanted: &str) -> Result<Option<&str>, BadRow> {
        match self.get(columns, wanted) {
            Some(_) => self.text(columns, wanted).map(Some),
            None if columns.asked(wanted).is_some_and(|column| !self.fields.contains_key(column)) => {
                Err(self.missing(columns, wanted))
            }
            None => Ok(None),
        }
    }

    /// Moves a field out, or copies it where another wanted field stands in the same column; `None` where it is
    /// absent or null. The others keep their order.
    pub fn take(&mut self, columns: &Columns, wanted: &str) -> Option<Value> {
        let column = columns.of(wanted);
        let is_shared = columns.0.iter().any(|(other, _)| *other != wanted && columns.of(other) == column);
        let value = match is_shared {
            true => self.fields.get(column).cloned(),
            false => self.fields.shift_remove(column),
        };
        value.filter(|value| !value.is_null())
    }

    /// As [`Row::take`], of a field that is given back as it is: an id.
    ///
    /// # Errors
    /// Its type can't be read.
    pub fn take_any(&mut self, columns: &Columns, wanted: &str) -> Result<Option<Value>, BadRow> {
        let value = self.take(columns, wanted);
        match value.as_ref().filter(|value| unreadable(value).is_some()) {
            Some(value) => Err(self.bad(format!("field {:?} is {}", columns.of(wanted), describe(value)))),
            None => Ok(value),
        }
    }

    /// An error that stands at this row.
    pub fn bad(&self, message: impl Into<String>) -> BadRow {
        BadRow { line: self.line, message: message.into() }
    }

    fn missing(&self, columns: &Columns, wanted: &str) -> BadRow {
        let column = columns.of(wanted);
        if self.fields.contains_key(column) {
            return self.bad(format!("field {column:?} is null"));
        }
        let mut has: Vec<_> = self.fields.keys().take(LISTED).map(|name| format!("{name:?}")).collect();
        match self.fields.len() {
            0 => has.push("no field".into()),
            n if n > LISTED => has.push(format!("{} more", n - LISTED)),
            _ => {}
        }
        self.bad(format!("no field {column:?}; the line has {}{}", has.join(", "), columns.hint(wanted)))
    }
}

/// What a value is, for an error: `a number (3)`, `a string ("good")`, `a list`.
pub fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(value) => format!("a boolean ({value})"),
        Value::Number(value) => format!("a number ({value})"),
        Value::String(value) if value.chars().nth(40).is_none() => format!("a string ({value:?})"),
        Value::String(value) => format!("a string ({:?} …)", value.chars().take(40).collect::<String>()),
        Value::Array(_) => "a list".into(),
        value @ Value::Object(_) => match unreadable(value) {
            Some(of) => format!("of a type of Parquet that can't be read ({of})"),
            None => "an object".into(),
        },
    }
}
