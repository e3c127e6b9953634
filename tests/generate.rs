//! Generation through exported graphs: the tokens of transformers, whoever stands beside whom, and the commands that
//! generate.

mod common;

use std::path::{Path, PathBuf};

use assert_cmd::assert::Assert;
use common::{copy_dir, json, models, tk};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use tk::data::tokens::Tokenizer;
use tk::generate::{Engine, Finish, Generated, GenerationConfig, Limits, Request};
use tk::runtime::Slots;

const MODEL: &str = "tiny-gpt2-lm";
/// Its end token, and its positions.
const END: u32 = 406;
const POSITIONS: usize = 128;
const LARGE: Limits = Limits { slots: 32, cache_bytes: 1 << 30 };

/// The tiny model, exported.
struct Bench {
    dir: tempfile::TempDir,
    tokenizer: Tokenizer,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy_dir(&models(MODEL), dir.path());
        Self { tokenizer: common::exported(dir.path()), dir }
    }

    fn slots(&self) -> Slots {
        common::slots(self.dir.path())
    }

    fn engine(&self, limits: Limits) -> Engine<'_> {
        Engine::new(self.slots(), self.tokenizer.inner(), vec![END], POSITIONS, limits)
    }

    fn run(&self, limits: Limits, requests: &[Request]) -> Vec<Vec<Generated>> {
        self.engine(limits).run(requests, &mut |_| Ok(())).unwrap()
    }

    fn input(&self, lines: &[Value]) -> PathBuf {
        let path = self.dir.path().join("prompts.jsonl");
        std::fs::write(&path, lines.iter().map(|line| format!("{line}\n")).collect::<String>()).unwrap();
        path
    }

    fn serve(&self, input: &Path, more: &[&str]) -> Assert {
        tk().arg("serve-batch").arg(self.dir.path()).arg("--input").arg(input).args(more).assert()
    }
}

fn lines(assert: Assert) -> Vec<Value> {
    let out = assert.success();
    out.get_output()
        .stdout
        .split(|b| *b == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect()
}

fn stderr(assert: &Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

fn request(prompt: &[u32], settings: GenerationConfig) -> Request {
    Request { prompt: prompt.to_vec(), settings }
}

#[test]
fn tokens_are_those_of_transformers_greedily_and_by_beams() {
    let bench = Bench::new();
    let reference = json(models(MODEL).join("reference.json"));
    let list = |key: &str| -> Vec<Vec<u32>> { serde_json::from_value(reference[key].clone()).unwrap() };
    let greedy = GenerationConfig { max_new_tokens: 64, ..GenerationConfig::default() };
    let beams = GenerationConfig { max_new_tokens: 16, num_beams: 4, ..GenerationConfig::default() };
    let requests: Vec<Request> = list("prompts")
        .iter()
        .flat_map(|prompt| [request(prompt, greedy.clone()), request(prompt, beams.clone())])
        .collect();
    let found = bench.run(LARGE, &requests);
    let expected: Vec<Vec<u32>> =
        list("generate").into_iter().zip(list("beams")).flat_map(|(greedy, beams)| [greedy, beams]).collect();
    assert_eq!(expected.len(), 6);
    for (texts, mut expected) in found.iter().zip(expected) {
        let ended = expected.last() == Some(&END);
        expected.retain(|&id| id != END);
        assert_eq!((texts.len(), &texts[0].ids), (1, &expected));
        assert_eq!(texts[0].finish, if ended { Finish::Stop } else { Finish::Length });
        assert_eq!(texts[0].text, bench.tokenizer.inner().decode(&expected, true).unwrap());
    }
}

/// Prompts of 1 to 100 tokens, some alike for their first half, with 1 to 60 new tokens each, drawn and greedy.
fn mixed() -> Vec<Request> {
    let prompt = |i: usize| (0..1 + i * 37 % 100).map(move |k| ((k * (7 + i / 5) + 11) % 400) as u32);
    (0..23)
        .map(|i| {
            let temperature = if i % 3 == 0 { 0.8 } else { 0.0 };
            let settings = GenerationConfig {
                max_new_tokens: 1 + i * 13 % 60,
                temperature,
                seed: i as u64,
                ..GenerationConfig::default()
            };
            request(&prompt(i).collect::<Vec<_>>(), settings)
        })
        .collect()
}

#[test]
fn a_text_does_not_depend_on_those_beside_it() {
    let bench = Bench::new();
    let requests = mixed();
    let alone: Vec<_> = requests.iter().flat_map(|one| bench.run(LARGE, std::slice::from_ref(one))).collect();
    for slots in [2, 5, 32] {
        assert_eq!(bench.run(Limits { slots, ..LARGE }, &requests), alone, "{slots} slots");
    }
    let lengths: Vec<usize> = alone.iter().map(|texts| texts[0].ids.len()).collect();
    assert!(lengths.iter().max() > lengths.iter().min().map(|least| least + 30).as_ref(), "{lengths:?}");
}

#[test]
fn short_prompts_of_unlike_length_are_read_together() {
    let bench = Bench::new();
    let settings = GenerationConfig { max_new_tokens: 12, ..GenerationConfig::default() };
    // the last ones begin as the one of 24 tokens does, so they are not read with it but copy what it has read
    let prompts: Vec<Vec<u32>> = [(24, 0), (21, 1), (22, 2), (20, 3), (1, 4), (2, 5), (23, 0), (24, 0)]
        .into_iter()
        .map(|(length, which)| (0..length).map(|k| (k * (7 + which) + 11 + 31 * which) % 400).collect())
        .collect();
    let requests: Vec<Request> = prompts.iter().map(|prompt| request(prompt, settings.clone())).collect();
    let alone: Vec<_> = requests.iter().flat_map(|one| bench.run(LARGE, std::slice::from_ref(one))).collect();
    for slots in [3, 32] {
        assert_eq!(bench.run(Limits { slots, ..LARGE }, &requests), alone, "{slots} slots");
    }
}

#[test]
fn the_cache_stays_within_its_limit_and_grows_with_the_texts() {
    let bench = Bench::new();
    let token = bench.slots().token_bytes();
    // room for one text of all positions
    let tight = Limits { slots: 32, cache_bytes: token * POSITIONS };
    assert_eq!(bench.run(tight, &mixed()), bench.run(LARGE, &mixed()));
    let (mut engine, request) =
        (bench.engine(Limits { cache_bytes: token * 127, ..LARGE }), mixed().remove(1));
    assert!(!engine.fits(&request));
    assert!(engine.run(&[request], &mut |_| Ok(())).is_err());
}

#[test]
fn several_texts_of_a_prompt_differ_and_repeat_by_seed() {
    let bench = Bench::new();
    let settings = GenerationConfig {
        temperature: 1.0,
        num_return_sequences: 4,
        max_new_tokens: 12,
        ..GenerationConfig::default()
    };
    let prompt: Vec<u32> = (20..60).collect();
    let texts =
        |seed| bench.run(LARGE, &[request(&prompt, GenerationConfig { seed, ..settings.clone() })]).remove(0);
    let (first, again, other) = (texts(1), texts(1), texts(2));
    assert_eq!(first, again);
    for i in 0..4 {
        assert!(first[..i].iter().all(|text| text.ids != first[i].ids) && first[i] != other[i]);
    }
}

#[test]
fn what_is_told_on_the_way_is_the_text() {
    let bench = Bench::new();
    let requests = mixed();
    let mut told = vec![(String::new(), 0); requests.len()];
    let texts = bench
        .engine(LARGE)
        .run(&requests, &mut |news| {
            told[news.request].0.push_str(news.text);
            told[news.request].1 += news.tokens;
            Ok(())
        })
        .unwrap();
    for (told, text) in told.iter().zip(&texts) {
        assert_eq!(told, &(text[0].text.clone(), text[0].ids.len()));
    }
}

#[test]
fn records_are_answered_in_their_order_with_their_own_settings() {
    let bench = Bench::new();
    let input = bench.input(&[
        json!({"prompt": "I love this", "max_new_tokens": 30}),
        json!({"prompt": "the movie was good", "id": "x"}),
        json!({"prompt": 3}),
        json!({"prompt": "", "temperature": 1, "num_return_sequences": 2}),
        json!({"prompt": "x ".repeat(200)}),
        json!({"prompt": "the", "top_p": 2}),
        json!({"prompt": "the", "num_beams": 3}),
        json!({"prompt": "x ".repeat(60), "max_new_tokens": 500}),
    ]);
    let found = lines(bench.serve(&input, &["--max-new-tokens", "9"]));
    let get = |i: usize, key: &str| found[i][key].clone();
    assert_eq!(found.len(), 8);
    assert_eq!(
        (get(0, "tokens"), get(0, "finish_reason"), get(0, "index")),
        (json!(30), json!("length"), json!(0))
    );
    assert_eq!((get(1, "id"), get(1, "tokens")), (json!("x"), json!(9)));
    assert!(get(2, "error").as_str().unwrap().contains("line 3"));
    assert_eq!(found[3]["texts"].as_array().unwrap().len(), 2);
    assert!(get(4, "error").as_str().unwrap().contains("--truncate-prompt"), "{}", found[4]);
    assert!(get(5, "error").as_str().unwrap().contains("top_p is 2"), "{}", found[5]);
    assert_eq!(get(6, "tokens"), 9);
    // as many as the model has positions for
    let prompt = bench.tokenizer.encode(&"x ".repeat(60), None, usize::MAX).unwrap().len();
    assert_eq!((get(7, "tokens"), get(7, "finish_reason")), (json!(POSITIONS - prompt), json!("length")));
    let cut = lines(bench.serve(&input, &["--truncate-prompt"]));
    // as much of it stays as leaves room for all that may be written; one token at least
    assert_eq!((&cut[4]["tokens"], &cut[4]["truncated"]), (&json!(POSITIONS - 1), &json!(true)));
    assert_eq!((&cut[0]["tokens"], cut[0].get("truncated")), (&json!(30), None));
    let cut = lines(bench.serve(&input, &["--truncate-prompt", "--max-new-tokens", "20"]));
    assert_eq!(cut[4]["tokens"], 20);
    let refused = bench.serve(&input, &["--strict"]).code(2);
    assert!(stderr(&refused).contains("prompts.jsonl:3:"), "{}", stderr(&refused));
}

#[test]
fn a_text_ends_before_its_stop_text() {
    let bench = Bench::new();
    let line = |more: Value| {
        let mut line = json!({"prompt": "I love this", "max_new_tokens": 40});
        line.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        line
    };
    let whole =
        lines(bench.serve(&bench.input(&[line(json!({}))]), &[]))[0]["text"].as_str().unwrap().to_owned();
    let stop: String = whole.chars().skip(11).take(3).collect(); // across the border of two tokens, as the text has it
    let found = lines(bench.serve(&bench.input(&[line(json!({"stop": stop}))]), &[])).remove(0);
    assert_eq!(found["text"], whole[..whole.find(&stop).unwrap()]);
    assert_eq!(found["finish_reason"], "stop");
}

#[test]
fn a_run_that_was_killed_is_gone_on_with_to_the_same_bytes() {
    let bench = Bench::new();
    let prompts: Vec<Value> =
        (0..150).map(|i| json!({"prompt": "x ".repeat(1 + i % 9), "top_k": 50})).collect();
    let input = bench.input(&prompts);
    let path = |name: &str| bench.dir.path().join(name);
    let to = |output: &str| {
        let output = path(output).to_str().unwrap().to_owned();
        ["--output", &output, "--window", "4", "--max-new-tokens", "60"].map(str::to_owned)
    };
    let serve = |output: &str, more: &[&str]| {
        let args = to(output);
        let args: Vec<&str> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
        bench.serve(&input, &args).success();
    };
    serve("whole.jsonl", &[]);
    let partial = path("out.jsonl.partial");
    let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin!("tk"))
        .arg("serve-batch")
        .arg(bench.dir.path())
        .arg("--input")
        .arg(&input)
        .args(to("out.jsonl"))
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    while std::fs::metadata(&partial).map_or(0, |file| file.len()) == 0 {
        assert!(child.try_wait().unwrap().is_none(), "the run was over before it had written anything");
        std::thread::yield_now();
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(partial.exists(), "the run was over before it was killed");
    serve("out.jsonl", &["--resume"]);
    assert!(std::fs::read(path("out.jsonl")).unwrap() == std::fs::read(path("whole.jsonl")).unwrap());
}

#[test]
fn matrices_in_blocks_are_measured_and_refused_above_the_limit() {
    let bench = Bench::new();
    let export = |precision: &str, more: &[&str]| {
        tk().args(["export", "--json", "--precision", precision]).arg(bench.dir.path()).args(more).assert()
    };
    let mut sizes = Vec::new();
    for precision in ["q8", "q4"] {
        let out = export(precision, &[]).success();
        let result: Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
        let (before, after) =
            (result["perplexity_fp32"].as_f64().unwrap(), result["perplexity"].as_f64().unwrap());
        assert!((after / before - 1.0).abs() < 0.02 && after != before, "{result}");
        sizes.push(result["bytes"].as_u64().unwrap());
        let entry = &json(bench.dir.path().join("onnx/manifest.json"))["generate"][precision];
        assert_eq!((&entry["perplexity"], &entry["precision"]), (&json!(after), &json!(precision)));
        let found =
            lines(bench.serve(&bench.input(&[json!({"prompt": "the"})]), &["--precision", precision]));
        assert_eq!(found[0]["tokens"], 128 - 1);
    }
    assert!(sizes[1] < sizes[0]);
    let refused = export("q4", &["--block-size", "48"]).code(2);
    assert!(stderr(&refused).contains("expected 32, 64, 128 or 256"), "{}", stderr(&refused));
    let text = bench.dir.path().join("text.jsonl");
    std::fs::write(&text, json!({"text": "I love this film, it is great!"}).to_string()).unwrap();
    let out = export("q8", &["--input", text.to_str().unwrap()]).success();
    let other: Value = serde_json::from_slice(&out.get_output().stdout).unwrap();
    assert_eq!(other["records"], 1);
    std::fs::remove_file(bench.dir.path().join("onnx/generate_q4.onnx")).unwrap();
    std::fs::write(&text, json!({"text": "a b c d e f g"}).to_string()).unwrap();
    let refused =
        export("q4", &["--max-perplexity-increase", "0.01", "--input", text.to_str().unwrap()]).code(1);
    let said = stderr(&refused);
    assert!(said.contains("more than --max-perplexity-increase 0.01 allows"), "{said}");
    assert!(!bench.dir.path().join("onnx/generate_q4.onnx").exists());
}

#[test]
fn a_text_is_measured_alike_by_candle_and_by_the_graph() {
    let bench = Bench::new();
    let text = bench.dir.path().join("text.jsonl");
    let line = |text: &str| json!({"text": text}).to_string() + "\n";
    std::fs::write(&text, line("I love this film") + &line(&"the plot was good ".repeat(40))).unwrap();
    let eval = |more: &[&str]| -> f64 {
        let out =
            tk().args(["eval", "--json"]).arg(bench.dir.path()).arg("--input").arg(&text).args(more).assert();
        let result: Value = serde_json::from_slice(&out.success().get_output().stdout).unwrap();
        result["metrics"]["loss"].as_f64().unwrap()
    };
    let (candle, graph) = (eval(&[]), eval(&["--runtime", "onnx"]));
    assert!((candle - graph).abs() < 1e-5, "{candle} {graph}");
}

#[test]
fn what_can_not_be_generated_with_is_refused_by_name() {
    let bench = Bench::new();
    let input = bench.input(&[json!({"prompt": "x"})]);
    for (more, said) in [
        (vec!["--logits"], "--logits is for text-classification"),
        (vec!["--ep", "cuda"], "GroupQueryAttention has no fp32 kernel for CUDA"),
        (vec!["--top-p", "0"], "top_p is 0"),
        (vec!["--precision", "q4"], "--precision q4` first"),
    ] {
        let refused = bench.serve(&input, &more).code(2);
        assert!(stderr(&refused).contains(said), "{}", stderr(&refused));
    }
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&models("tiny-gpt2-single"), dir.path());
    let generate =
        |command: &str| tk().arg(command).arg(dir.path()).args(["--max-new-tokens", "3"]).assert().code(2);
    assert!(stderr(&generate("generate")).contains("works with causal-lm"));
    let refused =
        tk().arg("serve-batch").arg(dir.path()).arg("--input").arg(&input).args(["--top-k", "3"]).assert();
    assert!(
        stderr(&refused.code(2))
            .contains("--top-k is for question-answering, masked-lm, masked-lm,next-sentence and causal-lm, and this is text-")
    );
    let refused = tk().arg("export").arg(dir.path()).args(["--precision", "q8"]).assert().code(2);
    assert!(
        stderr(&refused)
            .contains("--precision q8: a text-classification model is exported in fp32, fp16, bf16, int8"),
        "{}",
        stderr(&refused)
    );
}

#[test]
fn a_prompt_is_gone_on_with_on_standard_output() {
    let bench = Bench::new();
    let generate = |more: &[&str]| {
        let out = tk().arg("generate").arg(bench.dir.path()).arg("I love this").args(more).assert().success();
        String::from_utf8(out.get_output().stdout.clone()).unwrap()
    };
    let text = generate(&["--max-new-tokens", "9"]);
    let result: Value = serde_json::from_str(&generate(&["--max-new-tokens", "9", "--json"])).unwrap();
    assert_eq!(text, format!("{}\n", result["texts"][0]["text"].as_str().unwrap()));
    assert_eq!(generate(&["--num-return-sequences", "2", "--top-k", "9"]).matches("\n---\n").count(), 1);
}

/// Sets fields of a JSON file; null takes one away.
fn set(path: PathBuf, fields: Value) {
    let mut config = json(path.clone());
    let object = config.as_object_mut().unwrap();
    for (key, value) in fields.as_object().unwrap() {
        if value == "absent" {
            object.remove(key)
        } else {
            object.insert(key.clone(), value.clone())
        };
    }
    std::fs::write(path, config.to_string()).unwrap();
}

#[test]
fn any_of_the_end_tokens_ends_a_text_and_generation_config_goes_before() {
    let bench = Bench::new();
    let input = bench.input(&[json!({"prompt": "the cat sat", "max_new_tokens": 12})]);
    let beams = bench.dir.path().join("beams.jsonl");
    std::fs::write(
        &beams,
        json!({"prompt": "the cat sat", "max_new_tokens": 12, "num_beams": 2}).to_string(),
    )
    .unwrap();
    let path = |name: &str| bench.dir.path().join(name);
    // transformers: 268 133 81 247 …, by two beams 268 133 81 96 315 317 139 81 279 77 247
    let answered = |input: &Path| {
        let found = lines(bench.serve(input, &[])).remove(0);
        (found["tokens"].as_u64().unwrap(), found["finish_reason"].as_str().unwrap().to_owned())
    };
    let (stop, length) = ((3, "stop".to_owned()), (12, "length".to_owned()));
    for (config, generation, expected) in [
        (json!(406), json!([406, 247]), &stop),
        (json!(406), json!(247), &stop),
        (json!([406, 247]), json!(406), &length),
        (json!([406, 247]), json!(null), &length),
        (json!([406, 247]), json!("absent"), &length),
    ] {
        set(path("config.json"), json!({"eos_token_id": config}));
        set(path("generation_config.json"), json!({"eos_token_id": generation}));
        assert_eq!(&answered(&input), expected, "{config} {generation}");
    }
    set(path("generation_config.json"), json!({"eos_token_id": [406, 247]}));
    assert_eq!(answered(&beams), (10, "stop".to_owned()));
    std::fs::write(path("generation_config.json"), "{\"eos_token_id\": [406, 407]}").unwrap();
    let refused = bench.serve(&input, &[]).code(2);
    assert!(
        stderr(&refused).contains("generation_config.json: eos_token_id is [406,407]"),
        "{}",
        stderr(&refused)
    );
    std::fs::remove_file(path("generation_config.json")).unwrap();
    for (config, expected) in [(json!([406, 247]), &stop), (json!([247]), &stop), (json!(null), &length)] {
        set(path("config.json"), json!({"eos_token_id": config}));
        assert_eq!(&answered(&input), expected, "{config}");
    }
}

#[test]
fn every_record_draws_numbers_of_its_own_and_a_seed_of_its_own_repeats() {
    let bench = Bench::new();
    let line = json!({"prompt": "the cat sat on the mat", "temperature": 1.0, "max_new_tokens": 5});
    let mut prompts = vec![line.clone(); 60];
    for (at, seed) in [(60, 7), (61, 8), (62, 7)] {
        prompts.push(line.clone());
        prompts[at]["seed"] = json!(seed);
    }
    let input = bench.input(&prompts);
    let texts = |more: &[&str]| {
        lines(bench.serve(&input, more)).iter().map(|line| line["text"].to_string()).collect::<Vec<_>>()
    };
    let first = texts(&[]);
    let different: std::collections::HashSet<&String> = first[..60].iter().collect();
    assert!(different.len() > 50, "{}", different.len());
    assert_eq!((&first[60], first[61] == first[60]), (&first[62], false));
    assert_eq!(texts(&["--window", "7", "--slots", "3"]), first, "whoever stands beside whom");
    assert_ne!(texts(&["--seed", "1"])[0], first[0]);
}

#[test]
fn what_training_cut_texts_at_bounds_no_text_that_is_written() {
    let bench = Bench::new();
    set(bench.dir.path().join("tokenizer_config.json"), json!({"model_max_length": 8}));
    let input = bench
        .input(&[json!({"prompt": "the cat sat on the mat and the dog ran home", "max_new_tokens": 20})]);
    assert_eq!(lines(bench.serve(&input, &[]))[0]["tokens"], 20);
    let prompt = ["the cat sat on the mat and the dog ran home", "--max-new-tokens", "20"];
    tk().arg("generate").arg(bench.dir.path()).args(prompt).assert().success();
    for length in ["0", "1"] {
        let refused = bench.serve(&input, &["--max-length", length, "--truncate-prompt"]).code(2);
        assert!(stderr(&refused).contains("expected at least 3"), "{}", stderr(&refused));
        let text = bench.dir.path().join("text.jsonl");
        std::fs::write(&text, json!({"text": "the cat"}).to_string()).unwrap();
        let refused = tk()
            .arg("eval")
            .arg(bench.dir.path())
            .args(["--max-length", length, "--input"])
            .arg(&text)
            .assert();
        let refused = refused.code(2);
        assert!(stderr(&refused).contains("expected at least 3"), "{}", stderr(&refused));
    }
}

/// Records of extreme values in every field: an answer or an error stands in each one's place.
#[test]
fn no_record_ends_a_run() {
    let bench = Bench::new();
    let extremes: Vec<Value> = [
        "0",
        "1",
        "-1",
        "2",
        "3",
        "4097",
        "1e-50",
        "1e-300",
        "1e300",
        "-1e300",
        "1e38",
        "0.5",
        "null",
        "true",
        "\"\"",
        "\"x\"",
        "\"nan\"",
        "\"-inf\"",
        "[]",
        "{}",
        "4294967296",
        "281474976710656",
        "1000000000000",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "\"18446744073709551615\"",
        "18446744073709551612",
    ]
    .iter()
    .map(|text| serde_json::from_str(text).unwrap())
    .collect();
    let fields = [
        "max_new_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition_penalty",
        "num_beams",
        "length_penalty",
        "num_return_sequences",
        "seed",
        "stop",
    ];
    let value = proptest::sample::select(extremes.clone());
    let field = proptest::sample::select(fields.to_vec());
    let record = proptest::collection::vec((field, value), 1..4);
    let mut runner = TestRunner::deterministic();
    let mut records = Vec::new();
    for field in fields {
        for value in &extremes {
            records.push(json!({"prompt": "the cat", field: value}));
            records.push(json!({"prompt": "the cat", "temperature": 1, field: value}));
        }
    }
    for _ in 0..300 {
        let mut line = json!({"prompt": "the cat"});
        for (key, value) in record.new_tree(&mut runner).unwrap().current() {
            line[key] = value;
        }
        records.push(line);
    }
    let input = bench.input(&records);
    let found = lines(bench.serve(&input, &["--cache-mb", "1", "--max-new-tokens", "3"]));
    assert_eq!(found.len(), records.len());
    for (i, line) in found.iter().enumerate() {
        assert_eq!(line["index"], i);
        assert!(
            ["error", "text", "texts"].iter().any(|key| line.get(key).is_some()),
            "{} {line}",
            records[i]
        );
    }
    let tokens = |fields: &Value| {
        let at = records.iter().position(|record| record == fields).unwrap();
        found[at]["tokens"].clone()
    };
    let all = tokens(&json!({"prompt": "the cat", "max_new_tokens": i64::MAX}));
    assert_eq!(tokens(&json!({"prompt": "the cat", "max_new_tokens": u64::MAX})), all);
}

#[test]
fn no_flag_ends_a_run_but_by_a_result_or_an_error_of_its_own() {
    let bench = Bench::new();
    let flags = [
        "max-new-tokens",
        "temperature",
        "top-k",
        "top-p",
        "min-p",
        "repetition-penalty",
        "num-beams",
        "length-penalty",
        "num-return-sequences",
        "seed",
        "stop",
        "slots",
        "cache-mb",
    ];
    let values = ["0", "-1", "1e300", "nan", "", "4294967295", "281474976710656", "18446744073709551615"];
    let cases = flags.iter().flat_map(|flag| values.iter().map(move |value| (*flag, *value)));
    let cases: Vec<(&str, &str)> = cases.collect();
    let config = Config { cases: 40, failure_persistence: None, ..Config::default() };
    TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    )
    .run(&proptest::sample::select(cases), |(flag, value)| {
        let out = tk()
            .arg("generate")
            .arg(bench.dir.path())
            .args(["the cat", &format!("--{flag}={value}")])
            .output();
        let code = out.unwrap().status.code();
        prop_assert!(matches!(code, Some(0 | 2)), "--{flag}={value}: {code:?}");
        Ok(())
    })
    .unwrap();
}
