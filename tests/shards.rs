//! `tk serve-batch --shard I/N`: the outputs of all parts, one behind the other, are the bytes of one run.

mod common;

use std::path::{Path, PathBuf};

use common::{EMBEDDER, LANGUAGE_MODEL, copy_dir, models, tk};
use tk::data::records::{self, How, Source};

/// An exported model in a folder with room for inputs and outputs.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new(model: &str) -> Self {
        let bench = Self(tempfile::tempdir().unwrap());
        copy_dir(&models(model), &bench.path("model"));
        tk().args(["export", "--quiet"]).arg(bench.path("model")).assert().success();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn input(&self, name: &str, text: &str) -> PathBuf {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    fn serve(&self, input: &Path, output: &Path, args: &[&str]) -> assert_cmd::Command {
        let mut command = tk();
        command.arg("serve-batch").arg(self.path("model")).arg("--input").arg(input);
        command.arg("--output").arg(output).args(args);
        command
    }

    /// What a run writes.
    fn answers(&self, input: &Path, args: &[&str]) -> String {
        let output = self.path("out.jsonl");
        self.serve(input, &output, args).assert().success();
        std::fs::read_to_string(output).unwrap()
    }

    /// Holds the parts of several N against one run; what that run wrote.
    fn check(&self, input: &Path, parts: &[u32], args: &[&str]) -> String {
        let whole = self.answers(input, args);
        for &of in parts {
            let part = |i: u32| self.answers(input, &[args, &["--shard", &format!("{i}/{of}")]].concat());
            let parts: Vec<String> = (0..of).map(part).collect();
            assert!(parts.concat() == whole, "{}, {args:?}, {of} parts:\n{parts:?}", input.display());
        }
        whole
    }
}

/// 25 lines: texts of several lengths, some with an id, some that can't be used.
fn records() -> String {
    let line = |i: usize| match i % 7 {
        2 => "not json".to_owned(),
        4 => format!("{{\"text\": {i}, \"id\": \"bad {i}\"}}"),
        1 | 5 => format!("{{\"text\": \"{}\", \"id\": {i}.50}}", "the good ".repeat(i)),
        _ => format!("{{\"text\": \"{}a bad day\"}}", "rain and ".repeat(30 - i)),
    };
    (0..25).map(|i| format!("{}\n", line(i))).collect()
}

#[test]
fn parts_are_one_run_with_its_places_and_its_batches() {
    let bench = Bench::new("tiny-bert-single");
    let input = bench.input("in.jsonl", &records());
    let args = ["--window", "4", "--batch-tokens", "200", "--logits"];
    let whole = bench.check(&input, &[1, 2, 3, 9], &args);
    assert!(whole.lines().count() == 25 && whole.contains("\"index\":24") && whole.contains("\"error\""));
    // 7 windows among 9: parts without a record are files all the same
    assert_eq!(bench.answers(&input, &[&args[..], &["--shard", "0/9"]].concat()), "");

    let csv: String = (0..9).map(|i| format!("\"a {i},\r\nb\",k{i}\r\n\r\n")).collect();
    let csv = bench.input("in.csv", &format!("text,id\n{csv}"));
    assert!(bench.check(&csv, &[3], &["--window", "2"]).contains("\"id\":\"k8\""));
    assert_eq!(bench.check(&bench.input("none.jsonl", ""), &[2], &[]), "");

    // in int8 a record's numbers are those of its batch
    let int8 = ["--precision", "int8"];
    tk().args(["export", "--quiet", "--max-metric-drop", "1"])
        .args(int8)
        .arg(bench.path("model"))
        .assert()
        .success();
    let args = [&args[..], &int8].concat();
    let whole = bench.check(&input, &[2, 5], &args);
    let other = ["--window", "3", "--batch-tokens", "200", "--logits", int8[0], int8[1]];
    let other = bench.answers(&input, &other);
    assert_ne!(whole, other, "other windows are other batches");
}

#[test]
fn sentences_of_conll_are_not_torn() {
    let bench = Bench::new("tiny-bert-tokens");
    let sentences: String = (0..7).map(|i| format!("# text = x\nthe\nday {}\n\n", "x\n".repeat(i))).collect();
    let whole = bench.check(&bench.input("in.conll", &sentences), &[3], &["--window", "2", "--tags"]);
    assert_eq!(whole.lines().count(), 7);
}

#[test]
fn texts_are_those_of_one_run() {
    let bench = Bench::new(LANGUAGE_MODEL);
    let prompts: String = (0..7).map(|i| format!("{{\"prompt\": \"the {i}\"}}\n")).collect();
    let args = ["--window", "2", "--temperature", "1.3", "--max-new-tokens", "6", "--slots", "3"];
    let whole = bench.check(&bench.input("in.jsonl", &prompts), &[2, 3], &args);
    let texts: std::collections::BTreeSet<_> =
        whole.lines().filter_map(|line| line.split_once(',')).collect();
    assert_eq!(texts.len(), 7, "{whole}");
}

#[test]
fn a_part_that_was_killed_goes_on_and_is_no_other_part() {
    let bench = Bench::new("tiny-bert-single");
    let input = bench.input("in.jsonl", &records());
    let output = bench.path("out.jsonl");
    let part = |shard: &'static str| ["--window", "2", "--logits", "--shard", shard];
    let whole = bench.answers(&input, &part("1/2"));
    // one window, and a half
    let kept: usize = whole.split_inclusive('\n').take(3).map(str::len).sum();
    let partial = bench.path("out.jsonl.partial");
    let begin = || {
        std::fs::remove_file(&output).unwrap();
        let mut broken =
            bench.serve(&input, &output, &[&part("1/2")[..], &["--strict", "--resume"]].concat());
        broken.assert().code(2);
        assert!(bench.path("out.jsonl.partial.json").exists());
        std::fs::write(&partial, &whole[..kept]).unwrap();
    };
    begin();
    let out = bench.serve(&input, &output, &[&part("0/2")[..], &["--resume"]].concat()).assert().code(2);
    let error = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
    assert!(error.contains("shard was \"1/2\", is \"0/2\""), "{error}");
    let out = bench.serve(&input, &output, &["--window", "2", "--logits", "--resume"]).assert().code(2);
    let error = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
    assert!(error.contains("shard was \"1/2\", is nothing"), "{error}");
    let args = [&part("1/2")[..], &["--resume", "--json"]].concat();
    let out = bench.serve(&input, &output, &args).assert().success();
    let result: serde_json::Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
    assert_eq!((&result["resumed_records"], &result["records"]), (&2.into(), &13.into()));
    assert_eq!(std::fs::read_to_string(&output).unwrap(), whole);
}

#[test]
fn records_of_other_parts_stop_no_strict_run() {
    let bench = Bench::new("tiny-bert-single");
    let input =
        bench.input("in.jsonl", "{\"text\": \"a\"}\n{\"text\": \"b\"}\nnot json\n{\"text\": \"c\"}\n");
    let strict = |shard| ["--window", "1", "--strict", "--shard", shard];
    for good in ["0/4", "1/4", "3/4"] {
        bench.serve(&input, &bench.path("out.jsonl"), &strict(good)).assert().success();
    }
    let out = bench.serve(&input, &bench.path("new.jsonl"), &strict("2/4")).assert().code(2);
    assert!(String::from_utf8_lossy(&out.get_output().stderr).contains("in.jsonl:3: not JSON"));
    assert!(!bench.path("new.jsonl").exists() && !bench.path("new.jsonl.partial").exists());
}

#[test]
fn a_matrix_holds_the_rows_of_its_part() {
    let bench = Bench::new(EMBEDDER);
    let input = bench.input("in.txt", "a\nb\nc\nd\ne\n");
    let part = |shard| ["--window", "2", "--shard", shard];
    for (shard, places) in [("0/4", 0..0), ("1/4", 0..2), ("3/4", 4..5)] {
        let (npy, parquet) = (bench.path("m.npy"), bench.path("m.parquet"));
        bench.serve(&input, &npy, &part(shard)).assert().success();
        let header = String::from_utf8_lossy(&std::fs::read(npy).unwrap()[10..100]).into_owned();
        assert!(header.contains(&format!("'shape': ({}, 32)", places.len())), "{shard}: {header}");
        bench.serve(&input, &parquet, &part(shard)).assert().success();
        let rows = records::read(&Source::Path(parquet), &How::default()).unwrap();
        let found: Vec<_> = rows.map(|row| row.unwrap().unwrap().fields["index"].clone()).collect();
        assert_eq!(found, places.map(serde_json::Value::from).collect::<Vec<_>>(), "{shard}");
    }
}

#[test]
fn what_is_no_part_is_refused() {
    let bench = Bench::new("tiny-bert-single");
    let input = bench.input("in.txt", "a\n");
    let error = |input: &Path, shard: &str| {
        let mut command = bench.serve(input, &bench.path("out.jsonl"), &["--shard", shard]);
        let out = command.write_stdin("a\n").assert().code(2);
        assert!(!bench.path("out.jsonl").exists());
        String::from_utf8_lossy(&out.get_output().stderr).into_owned()
    };
    for (shard, wanted) in
        [("2/2", "the last is 1"), ("0/0", "N is 1 or more"), ("1", "such as 0/4"), ("a/b", "such as 0/4")]
    {
        let error = error(&input, shard);
        assert!(error.contains(wanted), "{shard}: {error}");
    }
    for stream in ["-", "/dev/null"] {
        let error = error(Path::new(stream), "0/2");
        assert!(error.contains("is no file: give --input FILE, or split the stream"), "{error}");
    }
}
