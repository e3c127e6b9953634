//! Files of any bytes are read or refused. Real files are changed at random; the inputs that once broke something are
//! under `fuzz/corpus/`, a folder a file's name, and are read first.
//!
//! A test takes some hundred inputs of each kind, always the same. `TK_FUZZ_SECONDS=600 cargo test --test fuzz` takes
//! new ones for as long; what breaks is printed and stays in `target/tmp/fuzz/`.

#[path = "../fuzz/targets.rs"]
mod targets;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestError, TestRng, TestRunner};
use targets::{TARGETS, Target};

/// What stands in files that break readers.
const TOKENS: &[&str] = &[
    "0",
    "-1",
    "1e18",
    "1e400",
    "18446744073709551615",
    "9223372036854775808",
    "4294967296",
    "NaN",
    "null",
    "true",
    "[]",
    "{}",
    "\"\"",
    "\"",
    ",",
    ":",
    "{",
    "[[",
    "}",
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\u{0}",
    "\u{feff}",
    "\\u0000",
    "\\ud800",
    "é",
    "😀",
    "text",
    "label",
    "prompt",
    "id",
];

/// One change of a file.
#[derive(Clone, Debug)]
enum Edit {
    Flip(Index, u8),
    Set(Index, u8),
    Insert(Index, &'static str),
    /// In the place of a run of digits or letters.
    Replace(Index, &'static str),
    Remove(Index, usize),
    Repeat(Index, usize),
    Cut(Index),
}

fn edit() -> impl Strategy<Value = Edit> {
    let token = || proptest::sample::select(TOKENS);
    prop_oneof![
        (any::<Index>(), 0u8..8).prop_map(|(at, bit)| Edit::Flip(at, bit)),
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Edit::Set(at, byte)),
        (any::<Index>(), token()).prop_map(|(at, token)| Edit::Insert(at, token)),
        (any::<Index>(), token()).prop_map(|(at, token)| Edit::Replace(at, token)),
        (any::<Index>(), 1usize..40).prop_map(|(at, length)| Edit::Remove(at, length)),
        (any::<Index>(), 1usize..40).prop_map(|(at, length)| Edit::Repeat(at, length)),
        any::<Index>().prop_map(Edit::Cut),
    ]
}

fn apply(bytes: &mut Vec<u8>, edit: &Edit) {
    if bytes.is_empty() {
        return;
    }
    let n = bytes.len();
    let end = |at: usize, length: usize| (at + length).min(n);
    match *edit {
        Edit::Flip(at, bit) => bytes[at.index(n)] ^= 1 << bit,
        Edit::Set(at, byte) => bytes[at.index(n)] = byte,
        Edit::Insert(at, token) => drop(bytes.splice(at.index(n)..at.index(n), token.bytes())),
        Edit::Replace(at, token) => {
            let word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'.';
            let start = at.index(n);
            let start = start - bytes[..start].iter().rev().take_while(|byte| word(byte)).count();
            let end = start + bytes[start..].iter().take_while(|byte| word(byte)).count();
            bytes.splice(start..end, token.bytes());
        }
        Edit::Remove(at, length) => drop(bytes.drain(at.index(n)..end(at.index(n), length))),
        Edit::Repeat(at, length) => {
            let part = bytes[at.index(n)..end(at.index(n), length)].to_vec();
            bytes.splice(at.index(n)..at.index(n), part);
        }
        Edit::Cut(at) => bytes.truncate(at.index(n)),
    }
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn seeds(target: &Target) -> Vec<Vec<u8>> {
    let lines = |text: &str| vec![text.as_bytes().to_vec()];
    match target.file {
        "records.jsonl" => lines(
            "{\"id\": 1, \"text\": \"good\", \"label\": \"yes\"}\n{\"text\": \"\\u00e9\", \"text_pair\": null}\n\n{\"text\"",
        ),
        "records.json" => [
            lines("[{\"text\": \"a\", \"label\": 1.5}, {\"text\": \"b\"}]"),
            lines("{\"data\": [{\"text\": []}]}"),
        ]
        .concat(),
        "records.csv" => lines("id,text,label\r\n1,\"a \"\"b\"\", c\nd\",x\r\n\r\n2,e,\r\n"),
        "records.tsv" => lines("id\ttext\tlabel\n1\ta \"b\tx\n2\té\t\n"),
        "records.txt" => lines("\u{feff}a line\r\n\nanother"),
        "records.jsonl.gz" => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(b"{\"text\": \"good\", \"label\": 1}\n{\"text\": \"bad\"}\n").unwrap();
            vec![encoder.finish().unwrap()]
        }
        "records.csv.zst" => vec![zstd::encode_all(&b"id,text,label\n1,\"a, b\",x\n"[..], 1).unwrap()],
        "records.parquet" => vec![parquet()],
        "sentences.conll" => [
            lines("-DOCSTART- -X- O O\n\nBob NNP B-PER\nsings VBZ O\n\nin IN O\nNew NNP B-LOC\nYork NNP I-LOC\n"),
            lines("# id = 1\n1\tun\u{e9}\tS-A\n2\tb c\tO\n\n# text\nd\tE-A\n"),
        ]
        .concat(),
        "questions.json" => lines(
            "{\"version\": \"1.1\", \"data\": [{\"title\": \"t\", \"paragraphs\": [{\"context\": \"\u{e9}a b, c \u{1f600} d\", \
             \"qas\": [{\"id\": \"1\", \"question\": \"who\", \"answers\": [{\"text\": \"b, c\", \"answer_start\": 3}]}, \
             {\"id\": \"2\", \"question\": \"\", \"is_impossible\": true, \"answers\": []}]}]}]}",
        ),
        "body.json" => [
            lines("{\"inputs\": [[\"a\", \"b\"], [\"c\"]], \"raw_scores\": true, \"truncate\": false}"),
            lines("{\"inputs\": {\"question\": \"who\", \"context\": \"b\"}, \"model\": \"m\"}"),
            lines("{\"inputs\": {\"source_sentence\": \"a\", \"sentences\": [\"b\"]}}"),
            lines("{\"query\": \"a\", \"documents\": [\"b\", {\"text\": \"c\"}], \"texts\": [\"d\"], \"top_n\": 1}"),
            lines("{\"input\": [\"a\"], \"encoding_format\": \"base64\", \"dimensions\": 3}"),
            lines(
                "{\"inputs\": [{\"name\": \"text\", \"datatype\": \"BYTES\", \"shape\": [2], \"data\": [\"a\", \"b\"]}]}",
            ),
            lines(
                "{\"id\": \"1\", \"inputs\": [{\"name\": \"input_ids\", \"datatype\": \"INT64\", \"shape\": [2, 2], \"data\": [[1, 2], [3, 4]]}, {\"name\": \"attention_mask\", \"datatype\": \"INT32\", \"shape\": [2, 2], \"data\": [1, 1, 1, 0]}], \"outputs\": [{\"name\": \"logits\", \"parameters\": {\"binary_data\": true}}]}",
            ),
            lines(
                "{\"inputs\": [{\"name\": \"input_ids\", \"datatype\": \"INT32\", \"shape\": [1, 2], \"parameters\": {\"binary_data_size\": 8}}, {\"name\": \"text\", \"datatype\": \"BYTES\", \"shape\": [1], \"parameters\": {\"binary_data_size\": 5}}], \"parameters\": {\"binary_data_output\": true}}\u{1}\0\0\0\u{2}\0\0\0\u{1}\0\0\0a",
            ),
            lines(
                "{\"inputs\": [\"a é\", \"\"], \"add_special_tokens\": false, \"ids\": [[101, 7], []], \"skip_special_tokens\": true}",
            ),
            lines("{\"prompt\": [\"a\"], \"max_tokens\": 3, \"temperature\": 0.5, \"n\": 2, \"stream\": true, \"stop\": \"x\"}"),
        ]
        .concat(),
        "requests.jsonl" => lines(
            "{\"id\": \"a\", \"prompt\": \"Once\", \"max_new_tokens\": 5, \"temperature\": 0.5, \"stop\": [\"x\"], \
             \"top_k\": 3, \"top_p\": 0.9, \"seed\": 1}\n{\"prompt\": \"\", \"num_beams\": 2, \
             \"num_return_sequences\": 2, \"length_penalty\": 1.0, \"repetition_penalty\": 1.2}\n",
        ),
        _ => target.seeds.iter().map(|seed| std::fs::read(root("models").join(seed)).unwrap()).collect(),
    }
}

/// A small Parquet file of texts and labels.
fn parquet() -> Vec<u8> {
    use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
    use parquet::file::writer::SerializedFileWriter;

    let schema = "message m { optional binary text (UTF8); optional int64 label; }";
    let schema = parquet::schema::parser::parse_message_type(schema).unwrap().into();
    let mut bytes = Vec::new();
    let mut writer = SerializedFileWriter::new(&mut bytes, schema, Default::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let texts = [ByteArray::from("a text"), ByteArray::from("another")];
    column.typed::<ByteArrayType>().write_batch(&texts, Some(&[1, 0, 1]), None).unwrap();
    column.close().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<Int64Type>().write_batch(&[1, 2, 3], Some(&[1, 1, 1]), None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    bytes
}

/// The folder that a target reads in: the bytes stay there if it breaks.
fn folder(target: &Target) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz").join(target.file);
    std::fs::create_dir_all(&dir).unwrap();
    for file in target.beside {
        let from = root("models").join(file);
        std::fs::copy(&from, dir.join(from.file_name().unwrap())).unwrap();
    }
    dir
}

fn fuzz(file: &str) {
    let target = TARGETS.iter().find(|target| target.file == file).unwrap();
    let dir = folder(target);
    let read = |bytes: &[u8]| {
        std::fs::write(dir.join(target.file), bytes).unwrap();
        (target.read)(&dir);
    };
    let seeds = seeds(target);
    seeds.iter().for_each(|seed| read(seed));
    if let Ok(found) = std::fs::read_dir(root("fuzz/corpus").join(target.file)) {
        found.for_each(|file| read(&std::fs::read(file.unwrap().path()).unwrap()));
    }

    let seconds = std::env::var("TK_FUZZ_SECONDS").ok().and_then(|seconds| seconds.parse().ok());
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    let strategy = (proptest::sample::select(seeds), proptest::collection::vec(edit(), 1..6));
    loop {
        let config = Config { cases: 128, failure_persistence: None, ..Config::default() };
        let rng = match seconds {
            Some(_) => TestRng::from_seed(RngAlgorithm::ChaCha, &rand_seed()),
            None => TestRng::deterministic_rng(RngAlgorithm::ChaCha),
        };
        let done = TestRunner::new_with_rng(config, rng).run(&strategy, |(mut bytes, edits)| {
            edits.iter().for_each(|edit| apply(&mut bytes, edit));
            read(&bytes);
            Ok(())
        });
        if let Err(TestError::Fail(why, (mut bytes, edits))) = done {
            edits.iter().for_each(|edit| apply(&mut bytes, edit));
            let kept = dir.join(format!("broken-{}", target.file));
            std::fs::write(&kept, &bytes).unwrap();
            panic!("{why}: {edits:?}, kept as {}: {}", kept.display(), String::from_utf8_lossy(&bytes));
        }
        if Instant::now() >= until {
            break;
        }
    }
}

/// A seed that differs from run to run.
fn rand_seed() -> [u8; 32] {
    use std::hash::{BuildHasher, RandomState};

    std::array::from_fn(|i| RandomState::new().hash_one(i) as u8)
}

macro_rules! tests {
    ($($name:ident $file:literal,)*) => {
        $(
            #[test]
            fn $name() {
                fuzz($file);
            }
        )*

        #[test]
        fn every_target_is_fuzzed() {
            assert_eq!([$($file),*], TARGETS.map(|target| target.file));
        }
    };
}

tests! {
    any_json_lines_are_read_or_refused "records.jsonl",
    any_json_is_read_or_refused "records.json",
    any_csv_is_read_or_refused "records.csv",
    any_tsv_is_read_or_refused "records.tsv",
    any_text_is_read_or_refused "records.txt",
    any_gzip_is_read_or_refused "records.jsonl.gz",
    any_zstandard_is_read_or_refused "records.csv.zst",
    any_parquet_is_read_or_refused "records.parquet",
    any_sentences_are_learnt_or_refused "sentences.conll",
    any_questions_are_learnt_or_refused "questions.json",
    any_body_is_read_or_refused "body.json",
    any_requests_are_read_or_refused "requests.jsonl",
    any_safetensors_are_read_or_refused "model.safetensors",
    any_configuration_is_read_or_refused "config.json",
    any_tokenizer_is_read_or_refused "tokenizer.json",
    any_vocabulary_is_read_or_refused "vocab.txt",
    any_merges_are_read_or_refused "merges.txt",
}
