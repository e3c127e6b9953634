//! `tk serve-batch`, the real binary on the tiny models: a line for a line, transformers' logits, and the same
//! bytes after a kill.

mod common;

use std::path::{Path, PathBuf};

use common::{CLASSIFIERS, copy_dir, json, max_abs, models, records_file, tk};
use serde_json::{Value, json};
use tk::onnx::proto::ModelProto;
use tk::onnx::{GraphKind, model, write};
use tk::saved::Saved;

/// An exported model in a folder with room for inputs and outputs.
struct Bench(tempfile::TempDir);

impl Bench {
    fn new(model: &str) -> Self {
        let bench = Self(tempfile::tempdir().unwrap());
        copy_dir(&models(model), &bench.model());
        tk().arg("export").arg(bench.model()).assert().success();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn model(&self) -> PathBuf {
        self.path("model")
    }

    fn input(&self, name: &str, text: &str) -> PathBuf {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    /// Puts another graph in place, for which nobody vouches.
    fn replace_graph(&self, graph: ModelProto) {
        write::save(graph, &self.model().join("onnx/model.onnx"), false).unwrap();
        std::fs::remove_file(self.model().join("onnx/manifest.json")).unwrap();
    }

    fn serve(&self, input: &Path, args: &[&str]) -> assert_cmd::Command {
        let mut command = tk();
        command.arg("serve-batch").arg(self.model()).arg("--input").arg(input).args(args);
        command
    }

    /// The records of a run to standard output.
    fn lines(&self, input: &Path, args: &[&str]) -> Vec<Value> {
        parse(&self.serve(input, args).assert().success().get_output().stdout)
    }

    fn error(&self, input: &Path, args: &[&str]) -> String {
        let out = self.serve(input, args).assert().code(2);
        String::from_utf8_lossy(&out.get_output().stderr).into_owned()
    }
}

fn parse(text: &[u8]) -> Vec<Value> {
    text.split(|&b| b == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect()
}

#[test]
fn logits_are_transformers_in_the_order_of_the_input() {
    for name in CLASSIFIERS {
        let bench = Bench::new(name);
        let input = bench.path("in.jsonl");
        records_file(name, 1, &input);
        let reference = json(models(name).join("reference.json"));
        let max_length = reference["max_length"].as_u64().unwrap().to_string();
        for args in [&["--batch-tokens", "1"][..], &["--window", "3", "--threads", "1"], &["--ep", "cpu"]] {
            let args = [args, &["--logits", "--max-length", &max_length]].concat();
            let lines = bench.lines(&input, &args);
            let wanted: Vec<Vec<f32>> = serde_json::from_value(reference["logits"].clone()).unwrap();
            assert_eq!(lines.len(), wanted.len());
            for (i, (line, wanted)) in lines.iter().zip(&wanted).enumerate() {
                assert_eq!(line["index"], i);
                let found: Vec<f32> = serde_json::from_value(line["logits"].clone()).unwrap();
                let (distance, _) = max_abs(&found, wanted);
                assert!(distance < 1e-4, "{name} {i}: {distance}");
            }
        }
    }
}

#[test]
fn a_line_that_cannot_be_used_loses_nothing() {
    let bench = Bench::new("tiny-bert-single");
    let text = "{\"text\":\"good\",\"id\":\"a\"}\nnot json\n{\"other\":1}\n{\"text\":3,\"id\":7}\n{\"text\":\"last\"}\n";
    let input = bench.input("in.jsonl", text);
    let lines = bench.lines(&input, &["--window", "2"]);
    assert_eq!(lines.len(), 5);
    assert!(lines[0]["label"].is_string() && lines[0]["id"] == "a" && lines[0]["index"].is_null());
    assert!(lines[1]["error"].as_str().unwrap().starts_with("line 2:") && lines[1]["index"] == 1);
    assert!(lines[2]["error"].as_str().unwrap().contains("\"text\"") && lines[2]["index"] == 2);
    assert!(lines[3]["error"].is_string() && lines[3]["id"] == 7);
    assert!(lines[4]["label"].is_string() && lines[4]["index"] == 4);

    let output = bench.path("out.jsonl");
    let args = ["--output", output.to_str().unwrap(), "--json"];
    let out = bench.serve(&input, &args).assert().success();
    let result: Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
    assert_eq!(
        (&result["records"], &result["errors"], &result["provider"]),
        (&5.into(), &3.into(), &"cpu".into())
    );
    assert_eq!(result["truncated"], 0);
    assert_eq!(parse(&std::fs::read(&output).unwrap()), lines);
    let long = bench.input("long.txt", "the the the\nthe\n");
    let out = bench.serve(&long, &[&args[..], &["--max-length", "4"]].concat()).assert().success();
    let result: Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
    assert_eq!((&result["truncated"], &result["tokens"]), (&1.into(), &7.into()));
    let lines = parse(&std::fs::read(&output).unwrap());
    assert_eq!(
        (&lines[0]["truncated"], lines[1].get("truncated")),
        (&true.into(), None),
        "what was cut says so"
    );

    std::fs::remove_file(&output).unwrap();
    let error = bench.error(&input, &["--output", output.to_str().unwrap(), "--strict"]);
    assert!(error.contains("in.jsonl:2: not JSON"), "{error}");
    for left in ["out.jsonl", "out.jsonl.partial", "out.jsonl.partial.json"] {
        assert!(!bench.path(left).exists(), "{left}");
    }
}

#[test]
fn every_format_and_mapped_columns_are_read() {
    let bench = Bench::new("tiny-bert-single");
    let jsonl = bench.input("in.jsonl", "{\"text\":\"good, bad\"}\n{\"text\":\"the\"}\n");
    let wanted = bench.lines(&jsonl, &[]);
    let csv = bench.input("in.csv", "body\n\"good, bad\"\nthe\n");
    assert_eq!(bench.lines(&csv, &["--text-column", "body"]), wanted);
    let tsv = bench.input("in.tsv", "text\tother\ngood, bad\t1\nthe\t2\n");
    assert_eq!(bench.lines(&tsv, &[]), wanted);
    let txt = bench.input("in.txt", "good, bad\nthe\n");
    assert_eq!(bench.lines(&txt, &[]), wanted);
    let mut command = bench.serve(Path::new("-"), &["--format", "txt"]);
    let out = command.write_stdin("good, bad\nthe\n").assert().success();
    assert_eq!(parse(&out.get_output().stdout), wanted);
    let named = bench.input("named.csv", "text,key\nthe,k1\n");
    assert_eq!(bench.lines(&named, &["--id-column", "key"])[0]["id"], "k1");
}

#[test]
fn a_killed_run_goes_on_to_the_same_bytes() {
    let bench = Bench::new("tiny-bert-single");
    let input = bench.path("in.jsonl");
    records_file("tiny-bert-single", 80, &input);
    let records = std::fs::read_to_string(&input).unwrap().lines().count();
    let (whole, output) = (bench.path("whole.jsonl"), bench.path("out.jsonl"));
    let args = |output: &Path, more: &[&str]| -> Vec<String> {
        let output = output.to_str().unwrap();
        let fixed = ["--logits", "--window", "7", "--batch-tokens", "90", "--output", output];
        fixed.iter().chain(more).map(|&arg| arg.to_owned()).collect()
    };
    let run = |output: &Path, more: &[&str]| {
        let args = args(output, more);
        bench.serve(&input, &args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    run(&whole, &[]).assert().success();
    let bytes = std::fs::read(&whole).unwrap();

    // a real kill in the middle
    let partial = bench.path("out.jsonl.partial");
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("tk"))
        .arg("serve-batch")
        .arg(bench.model())
        .arg("--input")
        .arg(&input)
        .args(args(&output, &["--threads", "1"]))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while std::fs::metadata(&partial).map_or(0, |file| file.len()) < 2000 {
        assert!(child.try_wait().unwrap().is_none(), "the run was over before it had written anything");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!output.exists() && partial.exists(), "the run was over before it was killed");
    let settings = std::fs::read(bench.path("out.jsonl.partial.json")).unwrap();
    run(&output, &["--resume"]).assert().success();
    assert!(std::fs::read(&output).unwrap() == bytes);
    assert!(!partial.exists() && !bench.path("out.jsonl.partial.json").exists());

    // kills at every kind of place: nothing, within a line, at a line's end, at a window's end, all but the name
    let line = bytes.iter().position(|&b| b == b'\n').unwrap() + 1;
    let ends: Vec<usize> = (0..bytes.len()).filter(|&i| bytes[i] == b'\n').map(|i| i + 1).collect();
    for length in
        [0, 1, line - 1, line, line + 9, ends[6], ends[6] + 1, ends[20], bytes.len() - 1, bytes.len()]
    {
        std::fs::remove_file(&output).unwrap();
        std::fs::write(&partial, &bytes[..length]).unwrap();
        std::fs::write(bench.path("out.jsonl.partial.json"), &settings).unwrap();
        let out = run(&output, &["--resume", "--threads", "3", "--json"]).assert().success();
        assert!(std::fs::read(&output).unwrap() == bytes, "killed after {length} bytes");
        let result: Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
        assert_eq!(result["records"], records);
        let kept = ends.iter().filter(|&&end| end <= length).count() / 7 * 7;
        assert_eq!(result["resumed_records"], kept, "{length}");
    }

    // other settings, another input
    std::fs::write(&partial, &bytes[..ends[20]]).unwrap();
    std::fs::write(bench.path("out.jsonl.partial.json"), &settings).unwrap();
    let mut other = run(&output, &["--resume", "--max-length", "9"]);
    let error = String::from_utf8_lossy(&other.assert().code(2).get_output().stderr).into_owned();
    assert!(error.contains("max_length was 64, is 9"), "{error}");
    assert!(partial.exists());
    let longer = format!("{}\n", std::fs::read_to_string(&input).unwrap());
    std::fs::write(&input, longer).unwrap();
    let out = run(&output, &["--resume"]).assert().code(2);
    assert!(String::from_utf8_lossy(&out.get_output().stderr).contains("input was"));
}

#[test]
fn without_something_to_resume_it_starts() {
    let bench = Bench::new("tiny-bert-single");
    let input = bench.input("in.txt", "a\nb\n");
    let output = bench.path("out.jsonl");
    let out = bench.serve(&input, &["--output", output.to_str().unwrap(), "--resume"]).assert().success();
    assert!(String::from_utf8_lossy(&out.get_output().stderr).contains("nothing is resumed"));
    assert_eq!(std::fs::read_to_string(&output).unwrap().lines().count(), 2);
}

#[test]
fn wrong_usage_is_named_and_writes_nothing() {
    let bench = Bench::new("tiny-bert-single");
    let input = bench.input("in.txt", "a\n");
    let before = std::fs::read_dir(bench.0.path()).unwrap().count();
    let output = bench.path("out.jsonl");
    let out = output.to_str().unwrap();
    for (args, wanted) in [
        (&["--json"][..], "give --output FILE"),
        (&["--resume"], "give --output FILE"),
        (&["--output", "/absent/folder/out.jsonl"], "the folder /absent/folder is not there"),
        (&["--output", bench.model().to_str().unwrap()], "is a directory"),
        (&["--output", input.to_str().unwrap()], "would write over the input"),
        (&["--output", out, "--window", "9223372036854775807"], "9223372036854775807"),
        (&["--output", out, "--threads", "1000000000000"], "1000000000000"),
        (&["--output", ""], "no name of a file"),
        (&["--output", out, "--max-length", "65"], "65"),
        (&["--output", out, "--max-length", "1"], "at least 3"),
        (&["--output", out, "--ep", "gpu"], "\"gpu\" is no execution provider"),
        (&["--output", out, "--batch-tokens", "0"], "0"),
        (&["--output", out, "--precision", "int4"], "int4"),
        (&["--output", out, "--format", "xml"], "xml"),
    ] {
        let error = bench.error(&input, args);
        assert!(error.contains(wanted), "{args:?}: {wanted} is not in {error}");
    }
    assert!(bench.error(Path::new("/absent.jsonl"), &["--output", out]).contains("/absent.jsonl"));
    assert_eq!(std::fs::read_dir(bench.0.path()).unwrap().count(), before);
}

#[test]
fn a_provider_that_is_not_there_is_never_replaced_silently() {
    if tk::runtime::Provider::Cuda.compiled_in().unwrap() {
        return; // a build of ONNX Runtime with CUDA: another machine's test
    }
    let bench = Bench::new("tiny-bert-single");
    let (input, output) = (bench.input("in.txt", "a\n"), bench.path("out.jsonl"));
    let out = output.to_str().unwrap();
    for ep in ["cuda", "tensorrt", "tensorrt,cuda"] {
        let error = bench.error(&input, &["--ep", ep, "--output", out]);
        assert!(error.contains("is built without"), "{error}");
        assert!(!output.exists() && !bench.path("out.jsonl.partial").exists());
    }
    for ep in ["cuda,cpu", "auto"] {
        let run = bench.serve(&input, &["--ep", ep]).assert().success();
        let said = String::from_utf8_lossy(&run.get_output().stderr).into_owned();
        assert!(said.contains("provider: cpu, because"), "{ep}: {said}");
    }
}

#[test]
fn a_graph_that_is_missing_stale_or_broken_is_not_served() {
    let bench = Bench::new("tiny-bert-single");
    let input = bench.input("in.txt", "a\n");
    let graph = bench.model().join("onnx/model.onnx");
    let whole = std::fs::read(&graph).unwrap();
    std::fs::write(&graph, &whole[..whole.len() / 2]).unwrap();
    assert!(bench.error(&input, &[]).contains("not a whole ONNX model"));
    std::fs::write(&graph, &whole).unwrap();

    // trained on since
    let other = models("tiny-bert-single").join("model.safetensors");
    let mut weights = std::fs::read(&other).unwrap();
    let last = weights.len() - 1;
    weights[last] ^= 1;
    std::fs::write(bench.model().join("model.safetensors"), &weights).unwrap();
    let error = bench.error(&input, &[]);
    assert!(error.contains("is stale") && error.contains("other weights"), "{error}");
    let out = tk().arg("parity").arg(bench.model()).assert().code(2);
    assert!(String::from_utf8_lossy(&out.get_output().stderr).contains("is stale"));
    std::fs::copy(&other, bench.model().join("model.safetensors")).unwrap();
    bench.serve(&input, &[]).assert().success();

    std::fs::remove_file(&graph).unwrap();
    let error = bench.error(&input, &[]);
    assert!(error.contains("is not there: run `tk export") && error.contains("first"), "{error}");
}

#[test]
fn a_graph_that_was_damaged_since_its_export_is_not_served() {
    for external in [false, true] {
        let bench = Bench::new("tiny-bert-single");
        if external {
            tk().arg("export").arg(bench.model()).arg("--external-data").assert().success();
        }
        let input = bench.input("in.txt", "a\n");
        let wanted = bench.lines(&input, &[]);
        let folder = bench.model().join("onnx");
        let damaged = folder.join(if external { "model.onnx_data" } else { "model.onnx" });
        let mut bytes = std::fs::read(&damaged).unwrap();
        let middle = bytes.len() / 2; // a weight
        bytes[middle] ^= 0x40;
        std::fs::write(&damaged, &bytes).unwrap();
        let error = bench.error(&input, &[]);
        assert!(error.contains("is not the file that `tk export` verified"), "{error}");
        assert!(error.contains(damaged.to_str().unwrap()) && error.contains("manifest.json"), "{error}");
        // what it computes, parity tells, which of one weight may be nothing
        assert_ne!(tk().arg("parity").arg(bench.model()).output().unwrap().status.code(), Some(2));
        // a change that somebody wants
        std::fs::remove_file(folder.join("manifest.json")).unwrap();
        bench.serve(&input, &[]).assert().success();
        tk().arg("export").arg(bench.model()).assert().success();
        assert_eq!(bench.lines(&input, &[]), wanted);
    }
}

#[test]
fn logits_that_are_not_finite_are_errors_of_their_records() {
    let bench = Bench::new("tiny-bert-single");
    let saved = Saved::open(&bench.model()).unwrap();
    let mut graph = model::build(
        &saved.config,
        &saved.task,
        &saved.weights,
        saved.tokenizer.hash(),
        GraphKind::fp32(saved.task.form(), 18),
    )
    .unwrap();
    // a word that was broken after the export
    let initializers = &mut graph.graph.as_mut().unwrap().initializer;
    let table = initializers.iter_mut().find(|t| t.name == "bert.embeddings.word_embeddings.weight").unwrap();
    let id = saved.tokenizer.encode("great", None, 64).unwrap().ids[1] as usize;
    let width = table.dims[1] as usize * 4;
    for value in table.raw_data[id * width..(id + 1) * width].as_chunks_mut().0 {
        *value = f32::NAN.to_le_bytes();
    }
    bench.replace_graph(graph);
    let input = bench.input("in.txt", "the\ngreat\nthe\n");
    let lines = bench.lines(&input, &[]);
    assert!(lines[0]["label"].is_string() && lines[2]["label"].is_string());
    assert!(lines[1]["error"].as_str().unwrap().contains("not finite"), "{}", lines[1]);
    assert_eq!(lines[0]["scores"], lines[2]["scores"]);
    assert_eq!(lines[1], json!({"index": 1, "error": lines[1]["error"]}));
}

#[test]
fn an_unfinished_output_is_not_written_over_while_it_is_read() {
    let bench = Bench::new("tiny-bert-single");
    let input = bench.input("out.jsonl.partial", "{\"text\":\"a\"}\n");
    let output = bench.path("out.jsonl");
    let error = bench.error(&input, &["--format", "jsonl", "--output", output.to_str().unwrap()]);
    assert!(error.contains("would write over the input"), "{error}");
    assert!(input.metadata().unwrap().len() > 0);
}

#[test]
fn a_session_that_fails_ends_the_run_and_what_was_answered_stays() {
    let bench = Bench::new("tiny-bert-single");
    let saved = Saved::open(&bench.model()).unwrap();
    let (config, task, hash) = (&saved.config, &saved.task, saved.tokenizer.hash());
    let mut graph =
        model::build(config, task, &saved.weights, hash, GraphKind::fp32(saved.task.form(), 18)).unwrap();
    // the table of words loses its last rows, which ONNX Runtime finds when one of them is looked up
    let id = |word: &str| saved.tokenizer.encode(word, None, 64).unwrap().ids[1];
    let words = ["the", "great", "bad", "day", "film"];
    let good = words.iter().min_by_key(|word| id(word)).unwrap();
    let bad = words.iter().max_by_key(|word| id(word)).unwrap();
    assert!(id(good) < id(bad));
    let initializers = &mut graph.graph.as_mut().unwrap().initializer;
    let table = initializers.iter_mut().find(|t| t.name == "bert.embeddings.word_embeddings.weight").unwrap();
    table.dims[0] = i64::from(id(bad));
    table.raw_data.truncate(table.dims.iter().product::<i64>() as usize * 4);
    bench.replace_graph(graph);

    let input = bench.input("in.txt", &format!("{good}\n{good}\n{bad}\n{good}\n"));
    let output = bench.path("out.jsonl");
    for (more, kept) in [(&[][..], 2), (&["--resume"], 2)] {
        let args = [&["--window", "1", "--output", output.to_str().unwrap()], more].concat();
        let out = bench.serve(&input, &args).assert().code(1);
        let said = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
        assert!(said.contains("running 1 sequences"), "{said}");
        assert!(!output.exists());
        let text = std::fs::read_to_string(bench.path("out.jsonl.partial")).unwrap();
        assert_eq!(text.lines().count(), kept);
    }
}

/// Outputs that are more than a file's name.
#[cfg(unix)]
mod outputs {
    use std::io::Read;
    use std::os::unix::fs::{FileTypeExt, symlink};
    use std::process::{Command, Stdio};

    use super::*;

    fn make_fifo(path: &Path) {
        let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the name is a whole C string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    }

    fn command(bench: &Bench, input: &Path) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("tk"));
        command.arg("serve-batch").arg(bench.model()).arg("--input").arg(input);
        command
    }

    #[test]
    fn a_link_stays_one_and_its_target_is_written_whole() {
        let bench = Bench::new("tiny-bert-single");
        let input = bench.input("in.txt", "a\nb\n");
        let wanted = bench.lines(&input, &[]);
        std::fs::create_dir(bench.path("far")).unwrap();
        let link = bench.path("link.jsonl");
        symlink("far/out.jsonl", &link).unwrap();
        for _ in 0..2 {
            // a target that is not there yet, and one that is
            bench.serve(&input, &["--output", link.to_str().unwrap()]).assert().success();
            assert!(link.is_symlink());
            assert_eq!(parse(&std::fs::read(bench.path("far/out.jsonl")).unwrap()), wanted);
            assert_eq!(std::fs::read_dir(bench.path("far")).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_pipe_and_a_device_are_written_to_and_stay_what_they_are() {
        let bench = Bench::new("tiny-bert-single");
        let input = bench.input("in.txt", "a\nb\n");
        let wanted = bench.lines(&input, &[]);
        let fifo = bench.path("fifo");
        make_fifo(&fifo);
        let reader = std::thread::spawn({
            let fifo = fifo.clone();
            move || std::fs::read(fifo).unwrap()
        });
        bench.serve(&input, &["--output", fifo.to_str().unwrap()]).assert().success();
        assert_eq!(parse(&reader.join().unwrap()), wanted);
        assert!(fifo.metadata().unwrap().file_type().is_fifo());

        let nothing = bench.path("nothing"); // a link, so that a fault replaces no device
        symlink("/dev/null", &nothing).unwrap();
        bench.serve(&input, &["--output", nothing.to_str().unwrap()]).assert().success();
        assert!(nothing.is_symlink() && nothing.metadata().unwrap().file_type().is_char_device());

        for name in ["/dev/stdout", "/dev/fd/1"] {
            assert_eq!(bench.lines(&input, &["--output", name]), wanted, "{name}");
            bench.error(&input, &["--output", name, "--json"]);
        }
        let before = std::fs::read_dir(bench.0.path()).unwrap().count();
        for name in [fifo.to_str().unwrap(), nothing.to_str().unwrap(), "/dev/stdout", "/dev/fd/2"] {
            let error = bench.error(&input, &["--output", name, "--resume"]);
            assert!(error.contains("--resume goes on with a file"), "{name}: {error}");
        }
        assert_eq!(std::fs::read_dir(bench.0.path()).unwrap().count(), before);
    }

    #[test]
    fn standard_output_goes_on_where_it_stands() {
        let bench = Bench::new("tiny-bert-single");
        let input = bench.input("in.txt", "a\n");
        let out = bench.path("all.txt");
        std::fs::write(&out, "head\n").unwrap();
        let file = std::fs::File::options().append(true).open(&out).unwrap();
        let mut run = command(&bench, &input);
        assert!(run.args(["--output", "/dev/stdout"]).stdout(file).status().unwrap().success());
        let text = std::fs::read_to_string(&out).unwrap();
        assert!(text.starts_with("head\n{") && text.lines().count() == 2, "{text}");
    }

    #[test]
    fn a_reader_that_goes_is_no_failure_for_standard_output_alone() {
        let bench = Bench::new("tiny-bert-single");
        let input = bench.input("in.txt", &"a\n".repeat(3000)); // more than a pipe holds
        let mut run = command(&bench, &input).stdout(Stdio::piped()).spawn().unwrap();
        drop(run.stdout.take());
        assert_eq!(run.wait().unwrap().code(), Some(0));

        let fifo = bench.path("fifo");
        make_fifo(&fifo);
        let mut run = command(&bench, &input).arg("--output").arg(&fifo).spawn().unwrap();
        drop(std::fs::File::open(&fifo).unwrap());
        assert_eq!(run.wait().unwrap().code(), Some(1));
    }

    #[test]
    fn a_device_that_is_full_is_a_failure() {
        if !Path::new("/dev/full").exists() {
            return; // not this system's
        }
        let bench = Bench::new("tiny-bert-single");
        let input = bench.input("in.txt", "a\n");
        let full = bench.path("full");
        symlink("/dev/full", &full).unwrap();
        bench.serve(&input, &["--output", full.to_str().unwrap()]).assert().code(1);
        assert!(full.is_symlink());
    }

    #[test]
    fn records_may_come_through_a_pipe() {
        let bench = Bench::new("tiny-bert-single");
        let (fifo, output) = (bench.path("in.txt"), bench.path("out.jsonl"));
        make_fifo(&fifo);
        let out = output.to_str().unwrap();
        let error = bench.error(&fifo, &["--output", out, "--resume"]);
        assert!(error.contains("is a pipe or a device"), "{error}");
        let writer = std::thread::spawn({
            let fifo = fifo.clone();
            move || std::fs::write(fifo, "a\nb\n").unwrap()
        });
        bench.serve(&fifo, &["--output", out]).assert().success();
        writer.join().unwrap();
        assert_eq!(std::fs::read_to_string(&output).unwrap().lines().count(), 2);
    }

    #[test]
    fn messages_that_nobody_reads_stop_nothing() {
        let bench = Bench::new("tiny-bert-single");
        let input = bench.input("in.txt", "a\n");
        let mut run = command(&bench, &input)
            .args(["--output", "/dev/stdout", "--verbose"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(run.stderr.take());
        let mut text = String::new();
        run.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        assert!(run.wait().unwrap().success());
        assert_eq!(text.lines().count(), 1);
    }
}

/// What is decisive stands behind the tokens that the model reads at once.
#[test]
fn long_texts_are_labelled_by_their_windows_where_that_is_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let (train, out) = (dir.path().join("train.jsonl"), dir.path().join("out"));
    let record = |word: &str, label: &str, at: usize| {
        let mut words = vec!["okay"; 60];
        words[at] = word;
        json!({"text": words.join(" "), "label": label})
    };
    let records = (0..6).flat_map(|i| [record("great", "good", 45 + i), record("terrible", "bad", 45 + i)]);
    let lines: String = records.map(|record| format!("{record}\n")).collect();
    std::fs::write(&train, &lines).unwrap();
    let run = |command: &str, more: &[&str]| {
        let mut tk = tk();
        tk.arg(command).args(more.iter().map(|arg| match *arg {
            "out" | "train.jsonl" => dir.path().join(arg).into_os_string(),
            other => other.into(),
        }));
        tk.assert().success()
    };
    let base = models("tiny-bert-single");
    let learn =
        ["--task", "text-classification", "--train", "train.jsonl", "--output", "out", "--epochs", "40"];
    let how = ["--max-length", "24", "--learning-rate", "5e-3", "--window-aggregation", "max", "--model"];
    run("train", &[&learn[..], &how[..], &[base.to_str().unwrap()]].concat());
    assert_eq!(json(out.join("config.json"))["window_aggregation"], "max");
    run("export", &["out"]);
    let accuracy = |more: &[&str]| {
        let said = run("eval", &[&["out", "--input", "train.jsonl", "--json"], more].concat());
        let found: Value = serde_json::from_slice(&said.get_output().stdout).unwrap();
        (found["metrics"]["accuracy"].as_f64().unwrap(), found["truncated"].as_u64().unwrap())
    };
    assert_eq!(accuracy(&[]), (1.0, 0), "by all windows");
    assert_eq!(accuracy(&["--runtime", "onnx"]), (1.0, 0));
    assert_eq!(accuracy(&["--window-aggregation", "first"]), (0.5, 12), "the beginnings are all alike");
    let served = |more: &[&str]| -> Vec<Value> {
        let said = run("serve-batch", &[&["out", "--input", "train.jsonl", "--output", "-"], more].concat());
        let text = String::from_utf8(said.get_output().stdout.clone()).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let labels =
        |answers: &[Value]| -> Vec<Value> { answers.iter().map(|answer| answer["label"].clone()).collect() };
    let all = served(&[]);
    assert_eq!(labels(&all), ["good", "bad"].repeat(6));
    assert!(all.iter().all(|answer| answer["truncated"].is_null()), "nothing was cut: {all:?}");
    let first = served(&["--window-aggregation", "first"]);
    assert!(first.iter().all(|answer| answer["truncated"] == true), "{first:?}");
}
