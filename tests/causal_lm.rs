//! `tk train --task causal-lm` and `tk eval`, the real binary: a small GPT-2 from nothing but a configuration and
//! texts, and the tiny one of `transformers` on prompts and completions.

mod common;

use std::path::{Path, PathBuf};

use common::{copy_dir, json, models, records_file, tk};
use serde_json::{Value, json};
use tk::runtime::decoder::{Decoder, Tokens};
use tk::runtime::{Provider, Providers};
use tk::say::Say;
use tk::task::causal_lm::metrics::{ChrF, rouge_l};

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    /// A configuration without tokenizer and weights, and texts of few words.
    fn new() -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        let config = json!({
            "model_type": "gpt2", "vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4,
        });
        std::fs::create_dir(bench.path("model")).unwrap();
        std::fs::write(bench.path("model/config.json"), config.to_string()).unwrap();
        let words = ["one", "two", "three", "four", "five", "six", "seven"];
        let text = |i: usize| (0..12).map(|j| words[(i + j) % words.len()]).collect::<Vec<_>>().join(" ");
        let lines =
            |n: usize| (0..n).map(|i| json!({"text": text(i)}).to_string() + "\n").collect::<String>();
        std::fs::write(bench.path("train.jsonl"), lines(140)).unwrap();
        std::fs::write(bench.path("eval.jsonl"), lines(7)).unwrap();
        bench
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn train(&self, output: &str, more: &[&str]) -> assert_cmd::assert::Assert {
        let mut tk = tk();
        tk.args(["train", "--task", "causal-lm", "--max-length", "48", "--batch-size", "8", "--json"]);
        tk.args(["--learning-rate", "3e-3", "--epochs", "8"]);
        tk.arg("--model").arg(self.path("model")).arg("--output").arg(self.path(output));
        tk.arg("--train").arg(self.path("train.jsonl")).args(more).assert()
    }

    fn eval(&self, model: &Path, input: &str) -> Value {
        let assert = tk().arg("eval").arg(model).arg("--input").arg(self.path(input)).arg("--json").assert();
        serde_json::from_slice(&assert.success().get_output().stdout).unwrap()
    }
}

fn stderr(assert: &assert_cmd::assert::Assert) -> String {
    String::from_utf8_lossy(&assert.get_output().stderr).into_owned()
}

#[test]
fn a_model_from_scratch_learns_its_texts_and_is_saved_whole() {
    let bench = Bench::new();
    let eval = bench.path("eval.jsonl").display().to_string();
    let assert = bench.train("out", &["--from-scratch", "--eval", &eval]).success();
    let result: Value = serde_json::from_slice(&assert.get_output().stdout).unwrap();
    let metric = |name: &str| result["eval"][name].as_f64().unwrap();
    assert!(metric("perplexity") < 2.0, "{result}"); // of a text of seven words in a row
    assert!((metric("loss").exp() / metric("perplexity") - 1.0).abs() < 1e-9);
    assert!(metric("bits_per_byte") < 0.5, "{result}");

    let out = bench.path("out");
    assert_eq!(bench.eval(&out, "eval.jsonl")["metrics"], result["eval"]);
    let (config, tokenizer) = (json(out.join("config.json")), json(out.join("tokenizer.json")));
    assert_eq!(config["architectures"], json!(["GPT2LMHeadModel"]));
    let vocabulary = tokenizer["model"]["vocab"].as_object().unwrap();
    assert_eq!(config["vocab_size"], vocabulary.len());
    assert_eq!(config["eos_token_id"], vocabulary["<|endoftext|>"]);
    let bytes = std::fs::read(out.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("transformer.wte.weight").unwrap().shape(), [vocabulary.len(), 32]);
    assert!(
        file.names().iter().all(|name| name.starts_with("transformer.")),
        "the head is the table of words"
    );
}

#[test]
fn a_run_repeats_bit_for_bit_with_its_tokenizer() {
    let bench = Bench::new();
    for output in ["a", "b"] {
        bench.train(output, &["--from-scratch", "--max-steps", "5"]).success();
    }
    for file in ["tokenizer.json", "model.safetensors"] {
        let read = |output: &str| std::fs::read(bench.path(output).join(file)).unwrap();
        assert!(read("a") == read("b"), "{file}");
    }
}

#[test]
fn only_completions_are_learnt_and_measured() {
    let bench = Bench::new();
    copy_dir(&models("tiny-gpt2-lm"), &bench.path("model"));
    let record =
        |text: &str| json!({"prompt": "a prompt of some words:", "completion": text}).to_string() + "\n";
    let both = json!({"text": "a prompt of some words: yes"}).to_string() + "\n";
    std::fs::write(bench.path("train.jsonl"), record(" yes").repeat(20)).unwrap();
    std::fs::write(bench.path("yes.jsonl"), record(" yes")).unwrap();
    std::fs::write(bench.path("text.jsonl"), both).unwrap();

    let before = bench.eval(&bench.path("model"), "yes.jsonl")["metrics"]["loss"].as_f64().unwrap();
    let assert = bench.train("out", &[]).success();
    assert!(stderr(&assert).contains("all from the checkpoint"), "{}", stderr(&assert));
    let after = bench.eval(&bench.path("out"), "yes.jsonl")["metrics"]["loss"].as_f64().unwrap();
    let text_after = bench.eval(&bench.path("out"), "text.jsonl")["metrics"]["loss"].as_f64().unwrap();
    assert!(after < 0.2 * before, "{before} → {after}");
    assert!(text_after > 2.0 * after, "the prompt was not learnt: {text_after}");
}

#[test]
fn what_does_not_fit_is_refused_by_name_before_anything_is_written() {
    let bench = Bench::new();
    let bert = models("tiny-bert-single").display().to_string();
    for (more, expected) in [
        (vec!["--model", &bert], "needs a model that predicts the next token (model_type gpt2)"),
        (vec!["--from-scratch", "--label-column", "x"], "--label-column is for text-classification"),
        (
            vec!["--from-scratch", "--best-metric", "accuracy"],
            "causal-lm has loss, bits_per_byte, perplexity",
        ),
        (vec!["--from-scratch", "--max-length", "65"], "above the 64 tokens that the model takes"),
        (vec![], "has no tokenizer"),
    ] {
        let mut tk = tk();
        tk.args(["train", "--task", "causal-lm", "--output"]).arg(bench.path("out"));
        tk.arg("--train").arg(bench.path("train.jsonl"));
        if !more.contains(&"--model") {
            tk.arg("--model").arg(bench.path("model"));
        }
        if !more.contains(&"--max-length") {
            tk.args(["--max-length", "32"]);
        }
        let assert = tk.args(&more).assert().code(2);
        assert!(stderr(&assert).contains(expected), "{more:?}: {}", stderr(&assert));
        assert!(!bench.path("out").exists());
    }
    std::fs::create_dir(bench.path("other")).unwrap();
    for (fields, expected) in [
        (
            json!({"n_embd": 30, "resid_pdrop": 1.0}),
            "n_embd 30 is not a multiple of n_head 4; resid_pdrop is 1, expected a probability",
        ),
        (json!({"scale_attn_weights": false}), "scale_attn_weights is false"),
        (json!({"tie_word_embeddings": false}), "tie_word_embeddings is false"),
        (json!({"activation_function": "mish"}), "activation_function: \"mish\" is no activation"),
    ] {
        let mut config = json(bench.path("model/config.json"));
        config.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
        std::fs::write(bench.path("other/config.json"), config.to_string()).unwrap();
        let mut tk = tk();
        tk.args(["train", "--task", "causal-lm", "--from-scratch", "--max-length", "32", "--output"]);
        tk.arg(bench.path("out")).arg("--train").arg(bench.path("train.jsonl")).arg("--model");
        let assert = tk.arg(bench.path("other")).assert().code(2);
        assert!(stderr(&assert).contains(expected), "{}", stderr(&assert));
    }
    std::fs::write(bench.path("train.jsonl"), "{\"text\": \"fine\"}\n{\"prompt\": \"no completion\"}\n")
        .unwrap();
    let assert = bench.train("out", &["--from-scratch"]).code(2);
    assert!(stderr(&assert).contains("train.jsonl:2") && stderr(&assert).contains("completion"));
    std::fs::write(bench.path("train.jsonl"), "{\"text\": \"\"}\n").unwrap();
    let assert = bench.train("out", &["--from-scratch"]).code(2);
    assert!(stderr(&assert).contains("no text has a token"), "{}", stderr(&assert));
}

#[test]
fn a_language_model_becomes_a_classifier_that_transformers_can_batch() {
    let bench = Bench::new();
    copy_dir(&models("tiny-gpt2-lm"), &bench.path("model"));
    // as a tokenizer without a padding token is, GPT-2's own
    let tokenizer = bench.path("model/tokenizer_config.json");
    let mut config = json(tokenizer.clone());
    config.as_object_mut().unwrap().remove("pad_token");
    std::fs::write(&tokenizer, config.to_string()).unwrap();
    let path = bench.path("model/config.json");
    let mut config = json(path.clone());
    config.as_object_mut().unwrap().remove("pad_token_id");
    std::fs::write(&path, config.to_string()).unwrap();
    records_file("tiny-gpt2-single", 2, &bench.path("train.jsonl"));
    let mut tk = tk();
    tk.args(["train", "--task", "text-classification", "--max-length", "48", "--max-steps", "3"]);
    tk.arg("--model").arg(bench.path("model")).arg("--train").arg(bench.path("train.jsonl"));
    let assert = tk.arg("--output").arg(bench.path("out")).assert().success();
    assert!(stderr(&assert).contains("score.weight drawn anew"), "{}", stderr(&assert));
    let config = json(bench.path("out/config.json"));
    assert_eq!(config["architectures"], json!(["GPT2ForSequenceClassification"]));
    assert_eq!((&config["pad_token_id"], &config["eos_token_id"]), (&json!(406), &json!(406)));
    assert_eq!(json(bench.path("out/tokenizer_config.json"))["pad_token"], "<|endoftext|>");

    std::fs::write(bench.path("train.jsonl"), "{\"text\": \"\", \"label\": \"negative\"}\n").unwrap();
    let mut tk = common::tk();
    tk.arg("eval").arg(bench.path("out")).arg("--input").arg(bench.path("train.jsonl"));
    let assert = tk.assert().code(2);
    assert!(stderr(&assert).contains("train.jsonl:1: the text is empty"), "{}", stderr(&assert));
}

/// The graph is held against candle with and without a past, and padded, before it is left there.
#[test]
fn an_export_goes_on_from_a_past_as_optimum_names_it() {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&models("tiny-gpt2-lm"), dir.path());
    for opset in ["14", "18", "21"] {
        let assert = tk().args(["export", "--json", "--opset", opset]).arg(dir.path()).assert().success();
        let result: Value = serde_json::from_slice(&assert.get_output().stdout).unwrap();
        assert!(result["max_abs"].as_f64().unwrap() < 2e-5, "{result}");
        assert!(result["records"].as_u64().unwrap() > 100, "{result}");
    }
    let graph = tk::onnx::write::load(&dir.path().join("onnx/model.onnx")).unwrap().graph.unwrap();
    let names = |values: &[tk::onnx::proto::ValueInfoProto]| -> Vec<String> {
        values.iter().map(|value| value.name.clone()).collect()
    };
    let caches = |name: &str| {
        (0..2).flat_map(|i| ["key", "value"].map(|part| format!("{name}.{i}.{part}"))).collect::<Vec<_>>()
    };
    let inputs = ["input_ids", "attention_mask", "position_ids"].map(str::to_owned).to_vec();
    assert_eq!(names(&graph.input), [inputs, caches("past_key_values")].concat());
    assert_eq!(names(&graph.output), [vec!["logits".to_owned()], caches("present")].concat());
}

#[test]
fn parity_compares_every_text_that_it_is_given() {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&models("tiny-gpt2-lm"), dir.path());
    let texts = dir.path().join("texts.jsonl");
    // nine of them, the last of one token, which has nothing behind a past
    let line = |text: &str| json!({"text": text}).to_string() + "\n";
    std::fs::write(&texts, (1..9).map(|n| line(&"x ".repeat(4 * n))).collect::<String>() + &line("x"))
        .unwrap();
    let parity = |more: &[&str]| tk().args(["parity", "--json"]).arg(dir.path()).args(more).assert();
    for (more, least) in [(vec![], 100), (vec!["--input", texts.to_str().unwrap()], 3 * 8 * 8)] {
        let assert = parity(&more).success();
        let result: Value = serde_json::from_slice(&assert.get_output().stdout).unwrap();
        let runtime = &result["runtimes"][0];
        assert_eq!((&runtime["name"], &runtime["compared_with"]), (&json!("ort-cpu"), &json!("eager")));
        assert!(runtime["records"].as_u64().unwrap() >= least && result["pass"] == true, "{result}");
        let in_place = &result["runtimes"][1];
        assert_eq!(in_place["name"], "ort-cpu-in-place");
        // three ways, and what the texts are gone on with
        assert!(in_place["records"].as_u64().unwrap() > least + 64, "{result}");
    }
    let assert = parity(&["--tolerance", "0"]).code(1);
    assert!(stderr(&assert).contains("ort-cpu, ort-cpu-in-place differ from eager"), "{}", stderr(&assert));
    let assert = parity(&["--runtimes", "eager,candle-onnx"]).code(2);
    assert!(stderr(&assert).contains("candle-onnx is handed no past"), "{}", stderr(&assert));
}

/// What transformers generates, greedily, from the graph and its past alone.
#[test]
fn greedy_tokens_are_those_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&models("tiny-gpt2-lm"), dir.path());
    tk().args(["export", "--quiet"]).arg(dir.path()).assert().success();
    let reference = json(models("tiny-gpt2-lm").join("reference.json"));
    let list = |key: &str| -> Vec<Vec<i64>> { serde_json::from_value(reference[key].clone()).unwrap() };
    let providers = Providers::only(Provider::Cpu);
    let graph = dir.path().join("onnx/model.onnx");
    let mut decoder = Decoder::open(&graph, &providers, 1, Say { quiet: true, ..Say::default() }).unwrap();
    for (prompt, expected) in list("prompts").into_iter().zip(list("generate")) {
        decoder.forget();
        let (mut all, mut read) = (prompt.clone(), 0);
        while all.len() < prompt.len() + expected.len() {
            let (mask, positions) = (vec![1; all.len()], (read as i64..all.len() as i64).collect::<Vec<_>>());
            let tokens = Tokens { rows: 1, ids: &all[read..], mask: &mask, positions: &positions };
            let scores = decoder.read(tokens).unwrap();
            read = all.len();
            let last = scores.array.rows().into_iter().last().unwrap();
            let best = (0..last.len()).fold(0, |best, i| if last[i] > last[best] { i } else { best });
            all.push(best as i64);
        }
        assert_eq!(all[prompt.len()..], expected);
    }
}

fn fields(path: PathBuf, more: Value) {
    let mut config = json(path.clone());
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    std::fs::write(path, config.to_string()).unwrap();
}

fn generate(dir: &Path, prompt: &str) -> assert_cmd::assert::Assert {
    tk().arg("generate").arg(dir).args([prompt, "--max-new-tokens", "12"]).assert()
}

#[test]
fn a_model_from_scratch_learns_what_texts_begin_with_and_fine_tuning_says_where_it_does_not() {
    let bench = Bench::new();
    fields(
        bench.path("model/config.json"),
        json!({"pad_token_id": 50256, "bos_token_id": 50256, "eos_token_id": [50256], "decoder_start_token_id": 50256}),
    );
    std::fs::write(
        bench.path("model/generation_config.json"),
        json!({"eos_token_id": 50256, "pad_token_id": 50256, "suppress_tokens": [50256], "max_new_tokens": 9}).to_string(),
    )
    .unwrap();
    let line = json!({"text": "one two three four five six seven"}).to_string() + "\n";
    std::fs::write(bench.path("train.jsonl"), line.repeat(64)).unwrap();
    bench
        .train("out", &["--from-scratch", "--epochs", "30", "--learning-rate", "5e-3", "--dropout", "0"])
        .success();
    let out = bench.path("out");
    let (config, generation) = (json(out.join("config.json")), json(out.join("generation_config.json")));
    let end = json(out.join("tokenizer.json"))["model"]["vocab"]["<|endoftext|>"].clone();
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        assert_eq!((&config[key], &generation[key]), (&end, &end), "{key}");
    }
    assert!(config.get("decoder_start_token_id").is_none() && generation.get("suppress_tokens").is_none());
    assert_eq!(generation["max_new_tokens"], 9);
    tk().args(["export", "--quiet"]).arg(&out).assert().success();
    for (prompt, expected) in [("", "one two"), ("one", " two three")] {
        let assert = generate(&out, prompt).success();
        let text = String::from_utf8_lossy(&assert.get_output().stdout).into_owned();
        assert!(text.starts_with(expected), "{prompt:?}: {text:?}");
    }

    // fine-tuned as transformers does, a text's first token is learnt by nobody
    copy_dir(&models("tiny-gpt2-lm"), &bench.path("model"));
    let exported = |name: &str, more: &[&str]| {
        bench.train(name, &[&["--max-steps", "1"], more].concat()).success();
        tk().args(["export", "--quiet"]).arg(bench.path(name)).assert().success();
        bench.path(name)
    };
    let tuned = exported("tuned", &[]);
    let refused = generate(&tuned, "").code(2);
    assert!(stderr(&refused).contains("not learnt what a text begins with"), "{}", stderr(&refused));
    generate(&tuned, "the").success();
    std::fs::write(bench.path("p.jsonl"), "{\"prompt\": \"\"}\n{\"prompt\": \"the\"}\n").unwrap();
    let assert =
        tk().arg("serve-batch").arg(&tuned).arg("--input").arg(bench.path("p.jsonl")).assert().success();
    let lines = String::from_utf8_lossy(&assert.get_output().stdout).into_owned();
    assert!(lines.contains("not learnt") && lines.contains("\"finish_reason\""), "{lines}");
    generate(&exported("joined", &["--concatenate"]), "").success();
    let untouched = bench.path("untouched");
    copy_dir(&models("tiny-gpt2-lm"), &untouched);
    tk().args(["export", "--quiet"]).arg(&untouched).assert().success();
    generate(&untouched, "").success();
}

#[test]
fn a_list_of_ends_is_kept_and_generation_config_goes_with_the_model() {
    let bench = Bench::new();
    copy_dir(&models("tiny-gpt2-lm"), &bench.path("model"));
    fields(bench.path("model/config.json"), json!({"eos_token_id": [406, 247]}));
    fields(bench.path("model/generation_config.json"), json!({"eos_token_id": [247], "top_k": 7}));
    let assert = bench.train("out", &["--max-steps", "1"]).success();
    assert!(
        stderr(&assert).contains("end by 406, the first of eos_token_id [406, 247]"),
        "{}",
        stderr(&assert)
    );
    let generation = json(bench.path("out/generation_config.json"));
    assert_eq!(json(bench.path("out/config.json"))["eos_token_id"], json!([406, 247]));
    assert_eq!((&generation["eos_token_id"], &generation["top_k"]), (&json!([247, 406]), &json!(7)));
    fields(bench.path("model/config.json"), json!({"pad_token_id": 50256}));
    let assert = bench.train("other", &["--max-steps", "1"]).code(2);
    assert!(stderr(&assert).contains("config.json: pad_token_id is 50256"), "{}", stderr(&assert));
}

/// The numbers are transformers 4.57.6's, of the same tokens.
#[test]
fn losses_are_those_of_transformers_joined_and_in_windows() {
    let bench = Bench::new();
    copy_dir(&models("tiny-gpt2-lm"), &bench.path("model"));
    let pairs = [
        json!({"prompt": "the cat sat on the mat and the dog ran", "completion": " home"}),
        json!({"prompt": "the dog sat on the log and the cat ran", "completion": " away"}),
    ];
    std::fs::write(bench.path("train.jsonl"), format!("{}\n{}\n", pairs[0], pairs[1])).unwrap();
    let assert = bench
        .train(
            "out",
            &["--epochs", "1", "--max-steps", "1", "--max-length", "64", "--dropout", "0", "--concatenate"],
        )
        .success();
    let result: Value = serde_json::from_slice(&assert.get_output().stdout).unwrap();
    assert!(stderr(&assert).contains("; 7 tokens are learnt"), "{}", stderr(&assert));
    assert!((result["train_loss"].as_f64().unwrap() - 7.513_095).abs() < 1e-4, "{result}");

    // 360 tokens and the end behind a prompt of 4, in windows of 128
    let completion = " sat on the mat and the dog ran home".repeat(20);
    let record = json!({"prompt": "the cat", "completion": completion});
    std::fs::write(bench.path("long.jsonl"), record.to_string()).unwrap();
    let metrics = &bench.eval(&bench.path("model"), "long.jsonl")["metrics"];
    assert!((metrics["loss"].as_f64().unwrap() - 6.427_1).abs() < 1e-4, "{metrics}");
}

#[test]
fn flags_that_are_no_finite_numbers_are_refused_and_do_not_fall_back() {
    let flags = ["--temperature", "--top-p", "--min-p", "--repetition-penalty", "--length-penalty"];
    for flag in flags {
        for value in ["nan", "inf", "-inf", "1e400", "1e39"] {
            let flag = format!("{flag}={value}");
            let said = stderr(&tk().args(["generate", "model", "the cat", &flag]).assert().code(2));
            assert!(said.contains("a finite number"), "{flag}: {said}");
        }
    }
}

#[test]
fn what_is_cut_is_said_in_eval_too() {
    let bench = Bench::new();
    copy_dir(&models("tiny-gpt2-lm"), &bench.path("model"));
    let long = "the cat sat on the mat ".repeat(40);
    let write = |record: Value| std::fs::write(bench.path("long.jsonl"), record.to_string()).unwrap();
    let eval =
        || tk().arg("eval").arg(bench.path("model")).arg("--input").arg(bench.path("long.jsonl")).assert();
    write(json!({"prompt": "the cat", "completion": long}));
    assert!(!stderr(&eval().success()).contains("cut"));
    write(json!({"prompt": long, "completion": " home"}));
    let said = stderr(&eval().success());
    assert!(said.contains("1 of 1 examples are longer than --max-length 128 and are cut"), "{said}");
}

#[test]
fn completions_are_generated_and_held_against_those_that_are_wanted() {
    let bench = Bench::new();
    let model = bench.path("model");
    copy_dir(&models("tiny-gpt2-lm"), &model);
    common::exported(&model);
    let lines = |name: &str, records: &[Value]| {
        let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
        std::fs::write(bench.path(name), lines).unwrap();
    };
    let long = "the cat sat on the mat ".repeat(40);
    let prompts = ["the cat", "the dog sat on the log and", &long];
    lines("prompts.jsonl", &prompts.map(|prompt| json!({ "prompt": prompt })));
    let served = tk()
        .args(["serve-batch", "--quiet", "--max-new-tokens", "9", "--truncate-prompt", "--input"])
        .args([bench.path("prompts.jsonl"), model.clone()])
        .assert()
        .success();
    let served = String::from_utf8_lossy(&served.get_output().stdout).into_owned();
    let text = |line: &str| serde_json::from_str::<Value>(line).unwrap()["text"].as_str().unwrap().to_owned();
    let texts: Vec<String> = served.lines().map(text).collect();
    let eval = |name: &str, more: &[&str]| {
        tk().args(["eval", "--json", "--input"]).args([bench.path(name), model.clone()]).args(more).assert()
    };
    let measured = |assert: &assert_cmd::assert::Assert| -> Value {
        serde_json::from_slice::<Value>(&assert.get_output().stdout).unwrap()["metrics"].clone()
    };
    let onnx = ["--runtime", "onnx", "--max-new-tokens", "9"];

    let record = |(prompt, completion): (&&str, &String)| json!({"prompt": prompt, "completion": completion});
    lines("same.jsonl", &prompts.iter().zip(&texts[..2]).map(record).collect::<Vec<_>>());
    let metrics = measured(&eval("same.jsonl", &onnx).success());
    assert_eq!(metrics["chrf"], 100.0, "{metrics}");
    let loss = &measured(&eval("same.jsonl", &[]).success())["loss"];
    assert!((metrics["loss"].as_f64().unwrap() - loss.as_f64().unwrap()).abs() < 1e-4);

    let (mut rouge, mut chrf) = (0.0, ChrF::default());
    // the last, of more tokens than are asked for, leaves the cut prompt the room that serve-batch does
    let wanted = ["the mat", "ran home", " sat on the mat and the dog ran home"].map(str::to_owned);
    for (wanted, found) in wanted.iter().zip(&texts) {
        rouge += rouge_l(wanted, found) / 3.0;
        chrf.add(wanted, found);
    }
    let mut others: Vec<Value> = prompts.iter().zip(&wanted).map(record).collect();
    others.insert(1, json!({"text": "a text without a prompt"}));
    lines("other.jsonl", &others);
    let done = eval("other.jsonl", &onnx).success();
    assert!(stderr(&done).contains("1 of 3 prompts are cut in front"), "{}", stderr(&done));
    let metrics = measured(&done);
    for (name, expected) in [("rouge_l", rouge), ("chrf", chrf.score())] {
        let found = metrics[name].as_f64().unwrap();
        assert!((found - expected).abs() < 1e-9 && found < 100.0, "{name}: {metrics}, expected {expected}");
    }

    // in candle nothing is generated, and that is said
    let eager = eval("same.jsonl", &[]).success();
    assert!(stderr(&eager).contains("--runtime onnx") && measured(&eager).get("chrf").is_none());
    lines("texts.jsonl", &[json!({"text": "the cat sat on the mat"})]);
    assert!(measured(&eval("texts.jsonl", &onnx[..2]).success()).get("chrf").is_none());
    for (name, flags) in [("texts.jsonl", &onnx[..]), ("same.jsonl", &onnx[2..])] {
        assert!(stderr(&eval(name, flags).code(2)).contains("--max-new-tokens"), "{name}");
    }
}
