//! What TensorBoard reads: scalars by step → an event file, of records of the TFRecord format.
//!
//! ```text
//! record = u64 length | u32 masked crc32c of the length | an Event | u32 masked crc32c of the Event
//! ```

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use prost::Message;

use super::checkpoint::names_in;
use crate::{Result, files, process};

/// How the names begin of files that TensorBoard reads.
const PREFIX: &str = "events.out.tfevents.";
/// How those end that are ours.
const SUFFIX: &str = ".tk";
/// The first event's, which says how the others are written.
const VERSION: &str = "brain.Event:2";

/// TensorFlow's `Event`, as far as it is written here.
#[derive(Clone, PartialEq, Message)]
struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    Session(Session),
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    values: Vec<Scalar>,
}

/// `Summary.Value` with its `simple_value`.
#[derive(Clone, PartialEq, Message)]
struct Scalar {
    #[prost(string, tag = "1")]
    tag: String,
    /// Written where it is 0, too: without it there is no value.
    #[prost(float, optional, tag = "2")]
    value: Option<f32>,
}

/// `SessionLog`.
#[derive(Clone, PartialEq, Message)]
struct Session {
    #[prost(enumeration = "Status", tag = "1")]
    status: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
enum Status {
    Unspecified = 0,
    Start = 1,
}

/// An event file that is being written; what is written is there for readers at once.
pub struct Events {
    file: File,
}

impl Events {
    /// Starts a file in a folder. TensorBoard forgets what other files of the folder have of steps behind `step`, the last
    /// one before this.
    ///
    /// # Errors
    /// It can't be written.
    pub fn start(folder: &Path, step: usize) -> Result<Self> {
        let mut events = Self { file: create(folder)? };
        events.write(0, What::FileVersion(VERSION.to_owned()))?;
        events.write(step + 1, What::Session(Session { status: Status::Start.into() }))?;
        Ok(events)
    }

    /// Adds a step's scalars, by their tags.
    ///
    /// # Errors
    /// They can't be written.
    pub fn scalars(&mut self, step: usize, scalars: impl IntoIterator<Item = (String, f64)>) -> Result<()> {
        let values =
            scalars.into_iter().map(|(tag, value)| Scalar { tag, value: Some(value as f32) }).collect();
        self.write(step, What::Summary(Summary { values }))
    }

    fn write(&mut self, step: usize, what: What) -> Result<()> {
        let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        let event = Event { wall_time, step: step as i64, what: Some(what) };
        // one write, so that a reader seldom meets half a record
        self.file.write_all(&framed(&event.encode_to_vec())).context("writing events for TensorBoard")
    }
}

/// The event files that runs have written in a folder.
///
/// # Errors
/// The folder can't be read.
pub fn written(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for name in names_in(folder)? {
        if name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX)) {
            found.push(folder.join(name));
        }
    }
    found.sort();
    Ok(found)
}

/// A new file, whose name sorts behind those of earlier seconds: TensorBoard reads a folder's files in that order.
fn create(folder: &Path) -> Result<File> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let host = process::host().filter(|host| files::is_plain_name(host)).unwrap_or("localhost".to_owned());
    let mut number = 0;
    loop {
        let name = format!("{PREFIX}{seconds:010}.{host}.{}.{number}{SUFFIX}", std::process::id());
        let path = folder.join(name);
        match OpenOptions::new().append(true).create_new(true).open(&path) {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => number += 1,
            file => return file.with_context(|| path.display().to_string()),
        }
    }
}

/// An event as a record.
fn framed(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    [&length[..], &masked_crc(&length), event, &masked_crc(event)].concat()
}

/// The checksum, masked as TFRecord wants it: a checksum of bytes that hold their own would tell little.
fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// CRC-32C by its definition, a bit at a time.
    fn crc(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0u32, |crc, &byte| {
            (0..8).fold(
                crc ^ u32::from(byte),
                |crc, _| {
                    if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 }
                },
            )
        })
    }

    /// The events of a file, whose framing is read by the format's definition.
    fn read(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).unwrap();
        let mut rest = &bytes[..];
        let mut events = Vec::new();
        let unmasked = |bytes: &[u8]| {
            u32::from_le_bytes(bytes.try_into().unwrap()).wrapping_sub(0xa282_ead8).rotate_left(15)
        };
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            assert_eq!(unmasked(&rest[8..12]), crc(&rest[..8]));
            let event = &rest[12..12 + length];
            assert_eq!(unmasked(&rest[12 + length..16 + length]), crc(event));
            events.push(Event::decode(event).unwrap());
            rest = &rest[16 + length..];
        }
        events
    }

    #[test]
    fn checksums_are_those_of_rfc_3720_masked() {
        assert_eq!(crc(b"123456789"), 0xe306_9283);
        assert_eq!(crc(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked_crc(b""), 0xa282_ead8u32.to_le_bytes());
        // as TensorFlow's own files begin: a length of 24
        assert_eq!(framed(&[0; 24])[..12], [24, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22]);
    }

    #[test]
    fn scalars_are_read_back_with_their_steps_and_what_is_no_number() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = Events::start(dir.path(), 4).unwrap();
        let scalars = [("train/loss", 0.0), ("a", f64::NAN), ("b", f64::INFINITY), ("é", -1.5)];
        events.scalars(5, scalars.map(|(tag, value)| (tag.to_owned(), value))).unwrap();
        let paths = written(dir.path()).unwrap();
        // without a flush: a running run is seen
        let read = read(&paths[0]);
        assert_eq!(read[0].what, Some(What::FileVersion("brain.Event:2".to_owned())));
        assert_eq!((read[1].step, read[1].what.clone()), (5, Some(What::Session(Session { status: 1 }))));
        let Some(What::Summary(summary)) = &read[2].what else { panic!("{read:?}") };
        assert!(read[2].step == 5 && read[2].wall_time > 1.7e9);
        for ((tag, value), read) in scalars.iter().zip(&summary.values) {
            let found = read.value.unwrap();
            assert!(read.tag == *tag && (found == *value as f32 || value.is_nan() && found.is_nan()));
        }
    }

    #[test]
    fn each_start_has_a_file_of_its_own_and_only_ours_are_ours() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..3 {
            Events::start(dir.path(), 0).unwrap();
        }
        std::fs::write(dir.path().join("events.out.tfevents.1.host.2.0"), "of another program").unwrap();
        assert_eq!(written(dir.path()).unwrap().len(), 3);
        assert_eq!(written(&dir.path().join("none")).unwrap().len(), 0);
    }
}
