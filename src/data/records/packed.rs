//! Bytes of gzip or Zstandard → the bytes that were packed.

use std::io::{BufRead, BufReader, Cursor, Error, ErrorKind, Read, Seek};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use super::{BUFFER, Opened};
use crate::{Result, bail_unusable, unusable};

/// How a file is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Gzip,
    Zstd,
}

impl std::fmt::Display for Packing {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Zstd => "Zstandard",
        })
    }
}

const ENDINGS: [(&str, Packing); 3] =
    [("gz", Packing::Gzip), ("zst", Packing::Zstd), ("zstd", Packing::Zstd)];

/// The most bytes that tell how a file is packed.
const MAGIC: usize = 4;

impl Packing {
    /// What a path's last extension says.
    fn of(path: &Path) -> Option<Self> {
        let ending = path.extension()?.to_str()?.to_lowercase();
        ENDINGS.iter().find(|(known, _)| *known == ending).map(|(_, packing)| *packing)
    }

    /// What a file's first bytes say. No text begins with them.
    fn of_bytes(bytes: &[u8]) -> Option<Self> {
        match *bytes {
            [0x1f, 0x8b, 8, ..] => Some(Self::Gzip),
            // a frame, or one to be skipped, which some programs write in front
            [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Some(Self::Zstd),
            _ => None,
        }
    }

    fn unpacked(self, packed: Box<dyn BufRead + Send>) -> std::io::Result<Box<dyn Read + Send>> {
        Ok(match self {
            Self::Gzip => Box::new(MultiGzDecoder::new(packed)),
            Self::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(packed)?),
        })
    }
}

/// A path without the extension that says how the file is packed.
pub(super) fn without_packing(path: &Path) -> std::path::PathBuf {
    match Packing::of(path) {
        Some(_) => path.with_extension(""),
        None => path.to_owned(),
    }
}

/// What was packed, where the input is, and how: its first bytes tell. `path` is its name, where it has one.
///
/// # Errors
/// Unusable: a name that says that the file is packed, and bytes that are not.
pub(super) fn unpacked(opened: Opened, path: Option<&Path>, name: &str) -> Result<(Opened, Option<Packing>)> {
    let unreadable = |error: Error| unusable!("{name} can't be read: {error}");
    let (start, opened) = match opened {
        Opened::File(mut file) => {
            let start = start(&mut file).map_err(unreadable)?;
            file.rewind().map_err(unreadable)?;
            (start, Opened::File(file))
        }
        Opened::Stream(mut input) => {
            let start = start(&mut input).map_err(unreadable)?;
            (start.clone(), Opened::Stream(Box::new(Cursor::new(start).chain(input))))
        }
    };
    let Some(packing) = Packing::of_bytes(&start) else {
        return match path.and_then(Packing::of) {
            Some(said) => bail_unusable!(
                "{name} is not packed by {said}, as its name says: {}",
                if start.is_empty() {
                    "it is empty"
                } else {
                    "a file that is read as it is needs another name"
                }
            ),
            None => Ok((opened, None)),
        };
    };
    let inner = packing.unpacked(opened.buffered()).map_err(unreadable)?;
    let unpacked = Unpacked { inner, packing, given: 0 };
    Ok((Opened::Stream(Box::new(BufReader::with_capacity(BUFFER, unpacked))), Some(packing)))
}

/// The first bytes of an input, as long as they may be those of a packed one: so that no pipe is waited for that has less
/// to give.
fn start(input: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut start = Vec::with_capacity(MAGIC);
    let may_be = |start: &[u8]| match start {
        [first] => matches!(first, 0x1f | 0x28 | 0x50..=0x5f),
        [first, second] => matches!((first, second), (0x1f, 0x8b) | (0x28, 0xb5) | (0x50..=0x5f, 0x2a)),
        _ => true,
    };
    while start.len() < MAGIC && may_be(&start) {
        let mut byte = [0];
        match input.read(&mut byte) {
            Ok(0) => break,
            Ok(_) => start.push(byte[0]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(start)
}

/// Counts what was unpacked, so that an error can say how far it came.
struct Unpacked {
    inner: Box<dyn Read + Send>,
    packing: Packing,
    given: u64,
}

impl Read for Unpacked {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        match self.inner.read(out) {
            Ok(count) => {
                self.given += count as u64;
                Ok(count)
            }
            Err(error) if error.kind() == ErrorKind::Interrupted || error.raw_os_error().is_some() => {
                Err(error)
            }
            Err(error) => {
                let how = match error.kind() {
                    ErrorKind::UnexpectedEof => "is cut off",
                    _ => "is damaged",
                };
                let message = format!(
                    "its {} data {how}: {} bytes were unpacked, and then: {error}",
                    self.packing, self.given
                );
                Err(Error::new(ErrorKind::InvalidData, message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::PathBuf;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use crate::data::records::{How, Item, Source, count, read, read_examples};

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    /// With the checksum that the program `zstd` writes.
    fn zstd(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.include_checksum(true).unwrap();
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
            let path = self.0.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        }

        /// What reading a file gives, down to the text of its error.
        fn read(&self, name: &str, bytes: &[u8]) -> Vec<String> {
            self.read_of(name, bytes, &How::default())
        }

        fn read_of(&self, name: &str, bytes: &[u8], how: &How) -> Vec<String> {
            let path = self.file(name, bytes);
            let told = |error: anyhow::Error| {
                assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
                format!("{error:#}").replace(&path.display().to_string(), "the file")
            };
            let told = |item: Item| item.map_or_else(told, |item| format!("{item:?}"));
            match read(&Source::Path(path.clone()), how) {
                Ok(rows) => {
                    let rows: Vec<String> = rows.map(told).collect();
                    if let Ok(count) = count(&path, how) {
                        assert_eq!(count, rows.len(), "records that were counted and not read");
                    }
                    rows
                }
                Err(error) => vec![told(Err(error))],
            }
        }

        fn refused(&self, name: &str, bytes: &[u8]) -> String {
            let path = self.file(name, bytes);
            let error = read_examples(&(&path).into(), &How::default(), Ok).unwrap_err();
            assert_eq!(crate::error::exit_code(&error), 2, "{error:#}");
            format!("{error:#}").replace(&format!("{}/", self.0.path().display()), "")
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn packed_records_are_those_of_the_plain_file(
            text in prop_oneof!["(\\{\"text\": \"[ab,é]{0,9}\"\\}\r?\n|[a,\"\t\n]{0,9}\n){0,40}", ".{0,40}"],
            cut in 0usize..100,
        ) {
            let (folder, bytes) = (Folder::new(), text.as_bytes());
            let (first, second) = bytes.split_at(cut.min(bytes.len()));
            let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9][..], &zstd(bytes)].concat();
            let ways = [
                ("gz", gzip(bytes)),
                ("gz", [gzip(first), gzip(second)].concat()),
                ("zst", zstd(bytes)),
                ("zst", [zstd(first), zstd(second)].concat()),
                ("ZST", skipped),
            ];
            for name in ["a.jsonl", "a.csv", "a.tsv", "a.txt", "a.json", "a.conll"] {
                let plain = folder.read(name, bytes);
                for (ending, packed) in &ways {
                    prop_assert_eq!(&folder.read(&format!("{name}.{ending}"), packed), &plain);
                    prop_assert_eq!(&folder.read(name, packed), &plain, "under a plain name");
                }
            }
        }

        #[test]
        fn what_is_cut_off_or_damaged_is_never_a_shorter_file(
            lines in proptest::collection::vec("[a-z]{0,20}", 1..200),
            at in any::<proptest::sample::Index>(),
            bit in 0u8..8,
        ) {
            let (folder, text) = (Folder::new(), lines.join("\n") + "\n");
            let plain = folder.read("a.txt", text.as_bytes());
            for (name, packed) in [("a.txt.gz", gzip(text.as_bytes())), ("a.txt.zst", zstd(text.as_bytes()))] {
                let at = at.index(packed.len());
                let error = folder.read(name, &packed[..at]).pop().unwrap();
                prop_assert!(error.contains("is cut off") || error.contains("is not packed"), "{}", error);
                let mut damaged = packed.clone();
                damaged[at] ^= 1 << bit;
                let read = folder.read(name, &damaged);
                // a bit of the header may say nothing of the text
                prop_assert!(read == plain || !read.last().unwrap().starts_with("Ok"), "{:?}", read);
            }
        }
    }

    #[test]
    fn a_name_that_promises_what_is_not_there_is_refused() {
        let folder = Folder::new();
        let said = folder.refused("a.jsonl.gz", b"{\"text\": \"a\"}\n");
        assert!(said.starts_with("a.jsonl.gz is not packed by gzip, as its name says: "), "{said}");
        let said = folder.refused("a.jsonl.zst", b"");
        assert!(said.starts_with("a.jsonl.zst is not packed by Zstandard, as its name says: it is empty"));
        assert!(
            folder.refused("a.gz", &gzip(b"a\n")).contains("a.gz: the format is not known: no extension")
        );
        let said = folder.refused("a.bz2", b"BZh9");
        assert!(said.contains("\"bz2\" is none of jsonl, "), "{said}");
        assert!(folder.refused("a.txt.gz", &gzip(b"")).contains("a.txt.gz has no records"));
    }

    #[test]
    fn what_stands_behind_the_packed_data_is_refused() {
        let folder = Folder::new();
        for (name, packed) in [("a.txt.gz", gzip(b"one\n")), ("a.txt.zst", zstd(b"one\n"))] {
            let said = folder.refused(name, &[&packed[..], b"rubbish behind it"].concat());
            assert!(said.contains(name) && said.contains("4 bytes were unpacked, and then"), "{said}");
        }
    }

    #[test]
    fn packed_parquet_is_refused_under_any_name() {
        let folder = Folder::new();
        for name in ["a.parquet.gz", "a.parquet"] {
            let said = folder.refused(name, &gzip(b"PAR1"));
            assert!(said.starts_with(&format!("{name} is packed by gzip: a Parquet file")), "{said}");
        }
    }

    #[test]
    fn an_encoding_is_that_of_what_was_packed() {
        let (folder, text) = (Folder::new(), "text,label\r\n\"naïve,\r\nb\",é\r\n");
        let wide: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let how = How { encoding: Some("utf-16".parse().unwrap()), ..How::default() };
        let read = folder.read("a.csv", text.as_bytes());
        assert!(read.len() == 1 && read[0].contains("na\u{ef}ve,\\r\\nb"), "{read:?}");
        assert_eq!(folder.read_of("a.csv.gz", &gzip(&wide), &how), read);
        assert_eq!(folder.read_of("a.csv.zst", &zstd(&wide), &how), read);
    }

    /// A pipe that gives no more than its first byte is not waited for.
    #[test]
    fn no_more_is_read_ahead_than_tells() {
        struct OneByte(Option<u8>);
        impl std::io::Read for OneByte {
            fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
                out[0] = self.0.take().expect("a second byte was asked for");
                Ok(1)
            }
        }
        assert_eq!(super::start(&mut OneByte(Some(b'{'))).unwrap(), b"{");
    }

    /// Of a frame that asks for gigabytes to be unpacked in, nothing is.
    #[test]
    fn a_frame_with_a_window_of_gigabytes_is_refused() {
        // magic, no content size, a window of 2^31 bytes, one empty last block
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, (31 - 10) << 3, 1, 0, 0];
        let said = Folder::new().refused("a.txt.zst", &frame);
        assert!(said.contains("requires too much memory"), "{said}");
    }
}
