//! Records as users have them, the real binary: other encodings, documents, multi-hot labels, Parquet of every codec,
//! pipes.

mod common;

use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use common::{Bench, json, records_file, tk};
use parquet::basic::{BrotliLevel, Compression, GzipLevel, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, FixedLenByteArray, FixedLenByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use serde_json::{Value, json};

impl Bench {
    fn exported(model: &str) -> Self {
        let bench = Self::with(model);
        bench.run("export", &[]).success();
        bench
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// A command on the model, its arguments in the folder.
    fn run(&self, verb: &str, args: &[&str]) -> assert_cmd::assert::Assert {
        tk().current_dir(self.0.path()).args([verb, "model"]).args(args).assert()
    }

    /// The answers of `serve-batch`.
    fn serve(&self, args: &[&str]) -> Vec<Value> {
        let assert = self.run("serve-batch", args).success();
        let text = String::from_utf8(assert.get_output().stdout.clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn eval(&self, model: &str, args: &[&str]) -> Value {
        let mut tk = tk();
        let assert = tk.current_dir(self.0.path()).args(["eval", model, "--json"]).args(args).assert();
        serde_json::from_slice(&assert.success().get_output().stdout).unwrap()
    }

    /// A run of one step that writes `output`.
    fn train(&self, task: &str, output: &str, args: &[&str]) -> assert_cmd::assert::Assert {
        let mut tk = tk();
        tk.current_dir(self.0.path()).args(["train", "--task", task, "--model", "model", "--output", output]);
        tk.args(["--max-length", "32", "--max-steps", "1"]).args(args).assert()
    }
}

fn stderr(assert: &assert_cmd::assert::Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

fn gzip(bytes: impl AsRef<[u8]>) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes.as_ref()).unwrap();
    encoder.finish().unwrap()
}

fn utf_16le(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

#[test]
fn text_in_a_named_encoding_is_that_text_in_every_command() {
    let bench = Bench::exported("tiny-bert-single");
    let text = "{\"text\":\"naïve good, 日本\",\"label\":\"positive\"}\n{\"text\":\"é bad\",\"label\":\"negative\"}\n";
    bench.write("a.jsonl", text);
    bench.write("w.jsonl", utf_16le(text));
    let encoded = ["--input", "w.jsonl", "--encoding", "utf-16le"];
    assert_eq!(bench.serve(&encoded), bench.serve(&["--input", "a.jsonl"]));
    let metrics = |args: &[&str]| bench.eval("model", args)["metrics"].clone();
    assert_eq!(metrics(&encoded), metrics(&["--input", "a.jsonl"]));
    bench.run("parity", &[&encoded[..], &["--runtimes", "eager,ort-cpu"]].concat()).success();
    bench.train("text-classification", "out", &["--train", "a.jsonl"]).success();
    let args = ["--train", "w.jsonl", "--encoding", "utf-16le"];
    bench.train("text-classification", "wide", &args).success();
    let weights = |output: &str| std::fs::read(bench.path(output).join("model.safetensors")).unwrap();
    assert_eq!(weights("out"), weights("wide"));

    for verb in ["serve-batch", "eval", "parity"] {
        let said = stderr(&bench.run(verb, &["--input", "w.jsonl"]).code(2));
        assert!(said.contains("w.jsonl") && said.contains("give --encoding utf-16le"), "{verb}: {said}");
        let said = stderr(&bench.run(verb, &["--input", "w.jsonl", "--encoding", "utf-9"]).code(2));
        assert!(said.contains("\"utf-9\" is no encoding"), "{verb}: {said}");
    }
    let said = stderr(&bench.train("text-classification", "other", &["--train", "w.jsonl"]).code(2));
    assert!(said.contains("give --encoding utf-16le"), "{said}");
    bench.write("latin.csv", b"text,label\ncaf\xe9,positive\ngood,negative\n");
    let said = stderr(&bench.train("text-classification", "other", &["--train", "latin.csv"]).code(2));
    assert!(said.contains("latin.csv:2: not UTF-8: byte 4 of the line"), "{said}");
    let latin = ["--input", "latin.csv", "--encoding", "latin-1"];
    bench.write("utf8.csv", "text,label\ncafé,positive\ngood,negative\n");
    assert_eq!(bench.serve(&latin), bench.serve(&["--input", "utf8.csv"]));

    let bench = Bench::with("tiny-gpt2-lm");
    bench.write("a.jsonl", text);
    bench.write("w.jsonl", utf_16le(text));
    let measured = |args: &[&str]| {
        let assert = bench.run("export", &[&["--precision", "q8", "--json"], args].concat()).success();
        serde_json::from_slice::<Value>(&assert.get_output().stdout).unwrap()["perplexity"].clone()
    };
    let perplexity = measured(&encoded);
    assert!(!perplexity.is_null());
    assert_eq!(perplexity, measured(&["--input", "a.jsonl"]));
    let said = stderr(&bench.run("export", &["--precision", "q8", "--input", "w.jsonl"]).code(2));
    assert!(said.contains("give --encoding utf-16le"), "{said}");
}

#[test]
fn a_text_unit_makes_one_text_of_lines_and_is_refused_where_it_says_nothing() {
    let bench = Bench::with("tiny-gpt2-lm");
    bench.write("verse.txt", "the cat sat\non the mat\n\n\nthe dog ran\nhome\n");
    bench.write("two.jsonl", "{\"text\":\"the cat sat\\non the mat\"}\n{\"text\":\"the dog ran\\nhome\"}\n");
    let loss = |args: &[&str]| bench.eval("model", args)["metrics"]["loss"].clone();
    let records = |args: &[&str]| bench.eval("model", args)["records"].as_u64().unwrap();
    let unit = |name| ["--input", "verse.txt", "--text-unit", name];
    assert_eq!(loss(&unit("document")), loss(&["--input", "two.jsonl"]));
    assert_ne!(loss(&unit("document")), loss(&unit("line")));
    assert_eq!(loss(&unit("line")), loss(&["--input", "verse.txt"]));
    assert_eq!((records(&unit("document")), records(&unit("file"))), (2, 1));
    let train = |args: &[&str]| bench.train("causal-lm", "out", &[args, &["--overwrite"]].concat());
    for (unit, examples) in [("document", "2 training examples"), ("file", "1 training examples")] {
        let said = stderr(&train(&["--train", "verse.txt", "--text-unit", unit]).success());
        assert!(said.contains(examples), "{said}");
    }
    let said = stderr(&train(&["--train", "two.jsonl", "--text-unit", "file"]).code(2));
    assert!(said.contains("--text-unit is for .txt files"), "{said}");
    let said = stderr(&bench.run("eval", &["--input", "two.jsonl", "--text-unit", "file"]).code(2));
    assert!(said.contains("--text-unit is for .txt files"), "{said}");
    let bench = Bench::with("tiny-bert-single");
    records_file("tiny-bert-single", 1, &bench.path("in.jsonl"));
    let unit = ["--text-unit", "file"];
    let train = bench.train("text-classification", "out", &[&["--train", "in.jsonl"], &unit[..]].concat());
    let eval = bench.run("eval", &[&["--input", "in.jsonl"], &unit[..]].concat());
    for said in [train, eval] {
        let said = stderr(&said.code(2));
        assert!(said.contains("--text-unit is for masked-lm, next-sentence, "), "{said}");
    }
}

#[test]
fn multi_hot_lists_are_learnt_measured_and_served_as_such() {
    let bench = Bench::with("tiny-bert-single");
    let lines = |labels: [Value; 4]| -> String {
        let texts = ["good", "bad", "good film", "the"];
        let record = |(text, label)| json!({"text": text, "label": label}).to_string() + "\n";
        texts.iter().zip(labels).map(record).collect::<String>().repeat(2)
    };
    bench.write("hot.jsonl", lines([json!([1, 0, 1]), json!([0, 1, 0]), json!([1, 1, 1]), json!([0, 0, 0])]));
    let floats =
        [json!([1.0, 0.0, 1.0]), json!([0.0, 1.0, 0.0]), json!([1.0, 1.0, 1.0]), json!([0.0, 0.0, 0.0])];
    bench.write("floats.jsonl", lines(floats));
    let names = [
        json!(["LABEL_0", "LABEL_2"]),
        json!(["LABEL_1"]),
        json!(["LABEL_2", "LABEL_1", "LABEL_0"]),
        json!([]),
    ];
    bench.write("names.jsonl", lines(names));
    // without the three labels of the model's own
    let config = bench.path("model/config.json");
    let mut raw = json(config.clone());
    raw["architectures"] = json!(["BertForMaskedLM"]);
    std::fs::write(&config, raw.to_string()).unwrap();
    for (data, output) in [("hot.jsonl", "ints"), ("floats.jsonl", "floats")] {
        bench.train("text-classification", output, &["--train", data, "--learning-rate", "1e-3"]).success();
        let config = json(bench.path(output).join("config.json"));
        assert_eq!(config["problem_type"], "multi_label_classification");
        assert_eq!(config["id2label"], json!({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}));
    }
    let weights = |output: &str| std::fs::read(bench.path(output).join("model.safetensors")).unwrap();
    assert_eq!(weights("ints"), weights("floats"));
    let metrics = |input| bench.eval("ints", &["--input", input])["metrics"].clone();
    assert_eq!(metrics("hot.jsonl"), metrics("names.jsonl"));
    assert_eq!(metrics("hot.jsonl"), metrics("floats.jsonl"));
    bench.write("wide.jsonl", "{\"text\":\"a\",\"label\":[1,0,1,0]}\n{\"text\":\"a\",\"label\":[0,0,0,0]}\n");
    let mut eval = tk();
    let eval = eval.current_dir(bench.0.path()).args(["eval", "ints", "--input", "wide.jsonl"]).assert();
    let said = stderr(&eval.code(2));
    assert!(said.contains("wide.jsonl:1: label is [1,0,1,0]"), "{said}");
}

#[test]
fn labels_that_cannot_be_used_are_listed_with_file_and_line() {
    let bench = Bench::with("tiny-bert-single");
    let lines = |labels: &[Value]| -> String {
        labels.iter().map(|label| json!({"text": "good", "label": label}).to_string() + "\n").collect()
    };
    let refused = |name: &str, text: &str, said: &[&str]| {
        bench.write(name, text);
        let found = stderr(&bench.train("text-classification", "out", &["--train", name]).code(2));
        for said in said {
            assert!(found.contains(said), "{said:?} is not in: {found}");
        }
        assert!(!bench.path("out").exists());
    };
    refused(
        "mixed.jsonl",
        &lines(&[json!("a"), json!(0.5), json!("b"), json!(["c"]), json!({}), json!("a")]),
        &["mixed.jsonl:2: label is 0.5", "mixed.jsonl:5: label is {}"],
    );
    refused("null.jsonl", &lines(&[json!("a"), Value::Null]), &["null.jsonl:2: field \"label\" is null"]);
    refused("empty.csv", "text,label\na,x\nb,\nc,y\n", &["empty.csv:3: field \"label\" is empty"]);
    let regression = "text\tlabel\na\t0.5\nb\tN/A\nc\t1.5\nd\t2.5\n";
    refused("na.tsv", regression, &["na.tsv:3: label is \"N/A\", expected a number"]);
    let flags = lines(&[json!("yes"), json!(true), json!("no")]);
    refused("flags.jsonl", &flags, &["flags.jsonl:2: label is true, among labels that are names"]);
    bench.write("many.jsonl", lines(&vec![json!("furious"); 12]));
    let said = stderr(&bench.run("eval", &["--input", "many.jsonl"]).code(2));
    assert!(said.contains("many.jsonl:10: label \"furious\" is not one of"), "{said}");
    assert!(!said.contains("many.jsonl:11:") && said.contains("and 2 more"), "{said}");
}

#[test]
fn packed_records_are_those_of_the_plain_file_in_every_command() {
    let bench = Bench::exported("tiny-bert-single");
    records_file("tiny-bert-single", 2, &bench.path("a.jsonl"));
    let text = std::fs::read(bench.path("a.jsonl")).unwrap();
    bench.write("a.jsonl.gz", gzip(&text));
    bench.write("a.jsonl.zst", zstd::encode_all(&text[..], 3).unwrap());
    bench.write("plain.jsonl", gzip(&text));
    let answers = bench.serve(&["--input", "a.jsonl"]);
    let metrics = |input| bench.eval("model", &["--input", input])["metrics"].clone();
    let weights = |output: &str| std::fs::read(bench.path(output).join("model.safetensors")).unwrap();
    let train = |output: &str, input: &str| {
        bench.train("text-classification", output, &["--train", input, "--eval", input]).success();
        weights(output)
    };
    let trained = train("out", "a.jsonl");
    for name in ["a.jsonl.gz", "a.jsonl.zst", "plain.jsonl"] {
        assert_eq!(bench.serve(&["--input", name]), answers, "{name}");
        assert_eq!(bench.serve(&["--input", name, "--shard", "0/1"]), answers, "{name}");
        assert_eq!(metrics(name), metrics("a.jsonl"), "{name}");
        assert_eq!(train(&format!("out-{name}"), name), trained, "{name}");
        bench.run("parity", &["--input", name, "--runtimes", "eager,ort-cpu"]).success();
        let mut tk = tk();
        tk.current_dir(bench.0.path()).args(["serve-batch", "model", "--input", "-"]);
        let piped = tk.write_stdin(std::fs::read(bench.path(name)).unwrap()).assert().success();
        let piped = String::from_utf8(piped.get_output().stdout.clone()).unwrap();
        let piped: Vec<Value> = piped.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(piped, answers, "{name}");
    }

    let packed = gzip(&text);
    bench.write("cut.jsonl.gz", &packed[..packed.len() - 9]);
    for verb in ["eval", "parity", "serve-batch"] {
        let said = stderr(&bench.run(verb, &["--input", "cut.jsonl.gz"]).code(2));
        assert!(said.contains("cut.jsonl.gz") && said.contains("its gzip data is cut off"), "{verb}: {said}");
    }
    let said = stderr(&bench.train("text-classification", "none", &["--train", "cut.jsonl.gz"]).code(2));
    assert!(said.contains("reading cut.jsonl.gz") && said.contains("bytes were unpacked"), "{said}");
    assert!(!bench.path("none").exists());
}

#[test]
#[cfg(unix)]
fn training_from_a_pipe_is_refused_and_does_not_wait() {
    let bench = Bench::with("tiny-bert-single");
    records_file("tiny-bert-single", 1, &bench.path("in.jsonl"));
    let name = std::ffi::CString::new(bench.path("pipe.jsonl").to_str().unwrap()).unwrap();
    // SAFETY: the name is a whole C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    for args in
        [["--train", "pipe.jsonl", "--eval", "in.jsonl"], ["--train", "in.jsonl", "--eval", "pipe.jsonl"]]
    {
        let said = stderr(&bench.train("text-classification", "out", &args).code(2));
        assert!(said.contains("pipe.jsonl is a pipe or a device"), "{said}");
    }
    assert!(!bench.path("out").exists());
}

/// A Parquet file of two texts, in a codec, with a column of an interval where `interval` asks for it.
fn parquet(path: &Path, codec: Compression, interval: bool) {
    let more = if interval { "required fixed_len_byte_array(12) since (INTERVAL);" } else { "" };
    let schema = format!("message m {{ required binary text (UTF8); {more} }}");
    let schema = Arc::new(parquet::schema::parser::parse_message_type(&schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(codec).build());
    let file = std::fs::File::create(path).unwrap();
    let mut writer = SerializedFileWriter::new(file, schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    let texts = [ByteArray::from("good, bad"), ByteArray::from("the")];
    column.typed::<ByteArrayType>().write_batch(&texts, None, None).unwrap();
    column.close().unwrap();
    if interval {
        let mut column = group.next_column().unwrap().unwrap();
        let values = vec![FixedLenByteArray::from(vec![0; 12]); 2];
        column.typed::<FixedLenByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
}

#[test]
fn parquet_of_every_codec_is_read() {
    let bench = Bench::exported("tiny-bert-single");
    bench.write("in.txt", "good, bad\nthe\n");
    let wanted = bench.serve(&["--input", "in.txt"]);
    let codecs = [
        Compression::UNCOMPRESSED,
        Compression::SNAPPY,
        Compression::GZIP(GzipLevel::default()),
        Compression::BROTLI(BrotliLevel::default()),
        Compression::LZ4,
        Compression::LZ4_RAW,
        Compression::ZSTD(ZstdLevel::default()),
    ];
    for codec in codecs {
        parquet(&bench.path("in.parquet"), codec, false);
        assert_eq!(bench.serve(&["--input", "in.parquet"]), wanted, "{codec}");
    }
}

#[test]
fn an_id_of_a_type_that_cannot_be_read_is_an_error() {
    let bench = Bench::exported("tiny-bert-single");
    parquet(&bench.path("in.parquet"), Compression::SNAPPY, true);
    let lines = bench.serve(&["--input", "in.parquet"]);
    assert!(lines.len() == 2 && lines.iter().all(|line| line["label"].is_string()), "{lines:?}");
    let by_id = ["--input", "in.parquet", "--id-column", "since"];
    let lines = bench.serve(&by_id);
    for (i, line) in lines.iter().enumerate() {
        let error = line["error"].as_str().unwrap();
        assert!(line["index"] == i && line["id"].is_null(), "{line}");
        assert!(error.contains("\"since\" is of a type of Parquet that can't be read"), "{error}");
        assert!(error.contains("INTERVAL"), "{error}");
    }
    let said = stderr(&bench.run("serve-batch", &[&by_id[..], &["--strict"]].concat()).code(2));
    assert!(said.contains("in.parquet:1: field \"since\""), "{said}");
}

#[test]
#[cfg(unix)]
fn records_come_from_a_pipe_where_its_format_is_named() {
    let bench = Bench::exported("tiny-bert-single");
    let text = "{\"text\":\"good, bad\"}\n{\"text\":\"the\"}\n";
    bench.write("in.jsonl", text);
    let wanted = bench.serve(&["--input", "in.jsonl"]);
    let piped = |args: &[&str]| {
        let mut tk = tk();
        tk.current_dir(bench.0.path()).args(["serve-batch", "model", "--input", "/dev/stdin"]).args(args);
        tk.write_stdin(text).assert()
    };
    piped(&["--format", "jsonl", "--output", "out.jsonl"]).success();
    let answers = std::fs::read_to_string(bench.path("out.jsonl")).unwrap();
    let answers: Vec<Value> = answers.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(answers, wanted);
    for (args, what) in [
        (&[][..], "/dev/stdin: the format is not known"),
        (
            &["--format", "parquet"],
            "/dev/stdin: a Parquet file is read from its end, so it can't come through a pipe",
        ),
        (&["--format", "jsonl", "--output", "o", "--resume"], "/dev/stdin is a pipe or a device"),
    ] {
        let said = stderr(&piped(args).code(2));
        assert!(said.contains(what), "{said}");
    }
}
