//! `tk serve`, the real binary on the tiny models: what it answers is what `tk serve-batch` answers, and nothing that a
//! client sends or does brings it down.

mod common;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::server::{Server, TEXTS, assert_near, batch, exported, overwrite};
use common::{models, tk};
use serde_json::{Value, json};

#[test]
fn entities_answers_and_fills_are_those_of_serve_batch() {
    let (_a, tagger) = exported("tiny-bert-tokens");
    let (_b, answerer) = exported("tiny-bert-answers");
    let (_c, masker) = exported("tiny-bert-masked");
    let server = Server::start(&[&tagger, &answerer, &masker], &["--threads", "2"]);
    let texts: Vec<Value> = TEXTS.iter().map(|text| json!({"text": text})).collect();
    let of = |answers: Vec<Value>, field: &str| {
        Value::Array(answers.into_iter().map(|answer| answer[field].clone()).collect())
    };

    let wanted = of(batch(&tagger, &texts), "entities");
    let (status, found) = server.post("/models/tiny-bert-tokens/entities", json!({"inputs": TEXTS}));
    assert_eq!(status, 200, "{found}");
    assert_near(&found, &wanted, "entities");
    // one text has one answer; a model is named in the body, too
    let (_, one) = server.post("/entities", json!({"inputs": TEXTS[0], "model": "tiny-bert-tokens"}));
    assert_near(&one, &wanted[0], "entities");

    let questions: Vec<Value> = (TEXTS.iter().zip(TEXTS.iter().rev()))
        .map(|(question, context)| json!({"question": question, "context": format!("{context} {question}")}))
        .collect();
    let wanted = Value::Array(batch(&answerer, &questions));
    let (status, found) = server.post("/models/tiny-bert-answers/answers", json!({"inputs": questions}));
    assert_eq!(status, 200, "{found}");
    assert_near(&found, &wanted, "answers");

    let masked = ["I [MASK] rain", "[MASK] [MASK]"];
    let wanted = of(batch(&masker, &masked.map(|text| json!({"text": text}))), "fills");
    let (status, found) = server.post("/models/tiny-bert-masked/fills", json!({"inputs": masked}));
    assert_eq!(status, 200, "{found}");
    assert_near(&found, &wanted, "fills");

    // what a model is not trained for, and names that there are not
    let (status, found) = server.post("/models/tiny-bert-masked/entities", json!({"inputs": "a"}));
    assert_eq!((status, found["error_type"].as_str()), (424, Some("Backend")), "{found}");
    assert!(found["error"].as_str().unwrap().contains("is a masked-lm model"), "{found}");
    let (status, found) = server.post("/predict", json!({"inputs": "a"}));
    assert_eq!(status, 422, "{found}");
    assert!(found["error"].as_str().unwrap().contains("there are several models"), "{found}");
    assert_eq!(server.post("/models/none/predict", json!({"inputs": "a"})).0, 404);
    assert_eq!(server.get("/none").0, 404);
    let (status, about) = server.get("/v1/models");
    assert_eq!((status, about["data"].as_array().unwrap().len()), (200, 3));
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn labels_come_in_the_forms_that_clients_know() {
    let (_guard, dir) = exported("tiny-bert-single");
    let server = Server::start(&[&dir], &[]);
    let wanted = batch(&dir, &[json!({"text": "good"}), json!({"text": "good", "text_pair": "bad"})]);
    let sorted = |answer: &Value| {
        let mut labels: Vec<Value> = (answer["scores"].as_object().unwrap().iter())
            .map(|(label, score)| json!({"score": score, "label": label}))
            .collect();
        labels.sort_by(|a, b| b["score"].as_f64().unwrap().total_cmp(&a["score"].as_f64().unwrap()));
        Value::Array(labels)
    };
    let (status, one) = server.post("/predict", json!({"inputs": "good"}));
    assert_eq!(status, 200, "{one}");
    assert_near(&one, &sorted(&wanted[0]), "a text");
    // a flat list is a pair, as in text-embeddings-inference; a batch is a list of lists
    assert_near(
        &server.post("/predict", json!({"inputs": ["good", "bad"]})).1,
        &sorted(&wanted[1]),
        "a pair",
    );
    let (_, both) = server.post("/classify", json!({"inputs": [["good"], ["good", "bad"]]}));
    assert_near(&both, &json!([sorted(&wanted[0]), sorted(&wanted[1])]), "a batch");
    let (status, error) = server.post("/predict", json!({"inputs": ["a", "b", "c"]}));
    assert_eq!(status, 422, "{error}");
    assert!(error["error"].as_str().unwrap().contains("several records are a list of lists"), "{error}");
    // raw scores are logits
    let (_, raw) = server.post("/predict", json!({"inputs": "good", "raw_scores": true}));
    let total: f64 = raw.as_array().unwrap().iter().map(|label| label["score"].as_f64().unwrap().exp()).sum();
    let best = raw[0]["score"].as_f64().unwrap().exp() / total;
    assert!((best - one[0]["score"].as_f64().unwrap()).abs() < 1e-6, "{raw}");
    assert_eq!(server.get("/info").1["task"], "text-classification");

    // tokens and their places, and back
    let text = "Good, café!";
    let (status, tokens) = server.post("/tokenize", json!({"inputs": text}));
    assert_eq!(status, 200, "{tokens}");
    let tokens = tokens[0].as_array().unwrap();
    let special: Vec<bool> = tokens.iter().map(|token| token["special"].as_bool().unwrap()).collect();
    assert!(
        special[0] && special[special.len() - 1] && special.iter().filter(|is| **is).count() == 2,
        "{tokens:?}"
    );
    let characters: Vec<char> = text.chars().collect();
    for token in tokens.iter().filter(|token| token["special"] == false) {
        let place = |end: &str| token[end].as_u64().unwrap() as usize;
        let text: String = characters[place("start")..place("stop")].iter().collect();
        assert_eq!(token["text"], text);
    }
    let ids: Vec<&Value> = tokens.iter().map(|token| &token["id"]).collect();
    let (_, texts) = server.post("/models/tiny-bert-single/decode", json!({"ids": [ids, []]}));
    let wanted = tk::data::tokens::Tokenizer::open(&dir).unwrap();
    let plain: Vec<u32> = ids.iter().map(|id| id.as_u64().unwrap() as u32).collect();
    assert_eq!(texts, json!([wanted.inner().decode(&plain, true).unwrap(), ""]));
    assert_eq!(server.post("/decode", json!({"ids": [4_000_000]})).0, 422);
    assert_eq!(server.post("/tokenize", json!({"inputs": 7})).0, 422);
}

#[test]
fn embeddings_come_in_the_forms_that_clients_know() {
    let (_guard, dir) = exported("tiny-bert-embedding");
    let server = Server::start(&[&dir], &[]);
    let texts: Vec<Value> = TEXTS.iter().map(|text| json!({"text": text})).collect();
    let wanted: Vec<Value> = batch(&dir, &texts).iter().map(|answer| answer["embedding"].clone()).collect();
    let (status, found) = server.post("/embed", json!({"inputs": TEXTS}));
    assert_eq!(status, 200, "{found}");
    assert_near(&found, &json!(wanted), "embeddings");

    let (status, found) =
        server.post("/v1/embeddings", json!({"input": TEXTS, "model": "tiny-bert-embedding"}));
    assert_eq!(status, 200, "{found}");
    let data = found["data"].as_array().unwrap();
    assert_near(&data[1]["embedding"], &wanted[1], "OpenAI's");
    assert!(data.iter().enumerate().all(|(i, row)| row["index"] == i && row["object"] == "embedding"));
    assert!(found["usage"]["total_tokens"].as_u64().unwrap() > TEXTS.len() as u64);
    let body = json!({"input": "a", "encoding_format": "base64", "dimensions": 4});
    let (_, found) = server.post("/v1/embeddings", body);
    let bytes = base64::Engine::decode(
        &base64::engine::general_purpose::STANDARD,
        found["data"][0]["embedding"].as_str().unwrap(),
    );
    let row: Vec<f32> = bytes.unwrap().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let length: f32 = row.iter().map(|x| x * x).sum::<f32>().sqrt();
    assert!(row.len() == 4 && (length - 1.0).abs() < 1e-6, "{row:?}");
    let (status, error) = server.post("/v1/embeddings", json!({"input": "a", "dimensions": 100_000}));
    assert_eq!((status, &error["error"]["type"]), (422, &json!("invalid_request_error")), "{error}");
    let (status, error) = server.post("/v1/embeddings", json!({"input": "a", "model": "other"}));
    assert_eq!(status, 404, "{error}");

    let pairs =
        batch(&dir, &[json!({"text": "a", "text_pair": "good"}), json!({"text": "a", "text_pair": "a"})]);
    let body = json!({"inputs": {"source_sentence": "a", "sentences": ["good", "a"]}});
    let (status, found) = server.post("/similarity", body);
    assert_eq!(status, 200, "{found}");
    assert_near(&found, &json!([pairs[0]["similarity"], pairs[1]["similarity"]]), "similarities");
}

#[test]
fn texts_are_ranked_by_a_model_that_gives_a_number() {
    let (_guard, dir) = exported("tiny-bert-regression");
    let server = Server::start(&[&dir], &[]);
    let texts = ["rain", "good day", "the film", "a"];
    let records = texts.map(|text| json!({"text": "sun", "text_pair": text}));
    let scores: Vec<f64> =
        batch(&dir, &records).iter().map(|answer| answer["score"].as_f64().unwrap()).collect();
    let mut order: Vec<usize> = (0..texts.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let (status, found) = server.post("/rerank", json!({"query": "sun", "texts": texts, "raw_scores": true}));
    assert_eq!(status, 200, "{found}");
    let wanted: Vec<Value> = order.iter().map(|&i| json!({"index": i, "score": scores[i]})).collect();
    assert_near(&found, &json!(wanted), "ranks");
    let body = json!({"query": "sun", "documents": [texts[0], {"text": texts[1]}, texts[2], texts[3]], "top_n": 2, "return_documents": true});
    let (status, found) = server.post("/v1/rerank", body);
    assert_eq!((status, found["results"].as_array().unwrap().len()), (200, 2), "{found}");
    assert_eq!(found["results"][0]["document"]["text"], texts[order[0]]);
    let sigmoid = 1.0 / (1.0 + (-scores[order[1]]).exp());
    assert!((found["results"][1]["relevance_score"].as_f64().unwrap() - sigmoid).abs() < 1e-6, "{found}");
}

#[test]
fn what_can_not_be_answered_is_refused_and_the_next_request_is_answered() {
    let (_guard, dir) = exported("tiny-bert-single");
    let server =
        Server::start(&[&dir], &["--max-body", "4000", "--max-records", "3", "--max-request-tokens", "100"]);
    let refused = |body: &str, status: u16, says: &str| {
        let (found, _, answer) = server.request("POST", "/predict", "", body);
        assert_eq!(found, status, "{body}: {answer}");
        assert!(answer.contains(says), "{body}: {answer}");
    };
    refused("", 422, "EOF");
    refused("{", 422, "EOF");
    refused("nonsense", 422, "expected");
    refused("{}", 422, "missing field `inputs`");
    refused("{\"inputs\": 7}", 422, "inputs: expected a text, a pair of texts");
    refused("{\"inputs\": \"a\"} {\"inputs\": \"a\"}", 422, "trailing");
    refused("{\"inputs\": []}", 422, "a list of 0 texts");
    refused("{\"inputs\": [[]]}", 422, "a list of 0 texts");
    refused(&json!({"inputs": [["a"], ["a"], ["a"], ["a"]]}).to_string(), 413, "4 records in one request");
    refused(&json!({"inputs": "a ".repeat(3000)}).to_string(), 413, "the body has more than 4000 bytes");
    let long = "a ".repeat(200);
    refused(&json!({"inputs": [[long], [long]]}).to_string(), 413, "more than 100 tokens");
    refused(&json!({"inputs": long, "truncate": false}).to_string(), 422, "record 0 is longer than the");
    refused(&format!("{}1{}", "[".repeat(1500), "]".repeat(1500)), 422, "");
    refused("{\"inputs\": \"\\ud800\"}", 422, "");
    // bytes that are no request, half a request, and a client that goes
    assert_eq!(server.send(b"\x00\xff nonsense\r\n\r\n").0, 400);
    drop(TcpStream::connect(&server.address).unwrap());
    for _ in 0..20 {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        let body = json!({"inputs": "a good day"}).to_string();
        let head = format!("POST /predict HTTP/1.1\r\nHost: tk\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    }
    assert_eq!(server.request("GET", "/predict", "", "").0, 405);
    let (status, found) = server.post("/predict", json!({"inputs": "a"}));
    assert_eq!(status, 200, "{found}");
    let (_, text) = server.get("/metrics");
    let text = text.as_str().unwrap();
    assert!(text.contains("tk_requests_total{route=\"/predict\",status=\"422\"}"), "{text}");
    assert!(text.contains("tk_records_total{model=\"tiny-bert-single\"}"), "{text}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn a_model_is_loaded_anew_while_requests_flow_and_one_that_can_not_be_loaded_changes_nothing() {
    let (guard, dir) = exported("tiny-bert-regression");
    let file = guard.path().join("key");
    std::fs::write(&file, "secret\n").unwrap();
    let server = Server::start(&[&dir], &["--api-key-file", file.to_str().unwrap(), "--threads", "2"]);
    let key = "Authorization: Bearer secret\r\n";
    let post = |path: &str, body: &str| {
        let (status, _, answer) = server.request("POST", path, key, body);
        (status, serde_json::from_str::<Value>(&answer).unwrap())
    };
    let score = || {
        let (status, found) = post("/predict", "{\"inputs\": \"a good day\"}");
        assert_eq!(status, 200, "{found}");
        found[0]["score"].as_f64().unwrap()
    };
    let reload = "/models/tiny-bert-regression/reload";
    let export = |number: f32| {
        overwrite(&dir, "classifier.bias", number);
        tk().args(["export", "--quiet"]).arg(&dir).assert().success();
    };
    let old = score();
    let about = || {
        let (_, _, body) = server.request("GET", "/info", key, "");
        serde_json::from_str::<Value>(&body).unwrap()
    };
    let sha = about()["model_sha"].clone();
    export(100.0);

    // requests of many records, so that some wait in the queue when the model is replaced
    let (stop, answered, failures) = (AtomicBool::new(false), AtomicUsize::new(0), Mutex::new(Vec::new()));
    let body = json!({"inputs": vec![["a good day and night"]; 40]}).to_string();
    let ask = || {
        while !stop.load(Ordering::Relaxed) {
            let (status, found) = post("/predict", &body);
            let ready = server.get("/ready").0;
            if (status, ready) != (200, 200) {
                failures.lock().unwrap().push((status, ready, found));
                stop.store(true, Ordering::Relaxed);
            }
            answered.fetch_add(1, Ordering::Relaxed);
        }
    };
    let reloads: Vec<(u16, Value)> = std::thread::scope(|scope| {
        (0..3).for_each(|_| drop(scope.spawn(ask)));
        let more = |count: usize| {
            let before = answered.load(Ordering::Relaxed);
            while answered.load(Ordering::Relaxed) < before + count && !stop.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
        };
        let reload = |_| {
            more(6);
            post(reload, "")
        };
        let reloads = (0..3).map(reload).collect();
        more(6);
        stop.store(true, Ordering::Relaxed);
        reloads
    });
    assert_eq!(failures.into_inner().unwrap(), []);
    for (status, found) in reloads {
        assert_eq!((status, &found["model_id"]), (200, &json!("tiny-bert-regression")), "{found}");
    }
    let new = score();
    assert!((new - old).abs() > 50.0, "{old} and {new}");
    assert_ne!(about()["model_sha"], sha);

    // a graph that is none, and one of other weights
    let graph = dir.join("onnx/model.onnx");
    let whole = std::fs::read(&graph).unwrap();
    std::fs::write(&graph, "nonsense").unwrap();
    let (status, found) = post(reload, "");
    assert_eq!(status, 424, "{found}");
    assert!(found["error"].as_str().unwrap().contains("the old model goes on"), "{found}");
    std::fs::write(&graph, &whole).unwrap();
    overwrite(&dir, "classifier.bias", -100.0);
    assert_eq!(post(reload, "").0, 424);
    assert_eq!(score(), new);
    assert_eq!(post("/models/other/reload", "").0, 404);

    // a signal does the same
    export(-100.0);
    // SAFETY: a signal to a child that was not waited for yet, so its number is its own.
    assert_eq!(unsafe { libc::kill(server.process.id() as i32, libc::SIGHUP) }, 0);
    while (score() - new).abs() < 50.0 {
        assert_eq!(server.get("/ready").0, 200);
    }
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn a_language_model_is_loaded_anew_while_texts_stream_and_none_is_dropped() {
    let (guard, dir) = exported("tiny-gpt2-lm");
    let file = guard.path().join("key");
    std::fs::write(&file, "secret\n").unwrap();
    let server = Server::start(&[&dir], &["--api-key-file", file.to_str().unwrap()]);
    let key = "Authorization: Bearer secret\r\n";
    let body = json!({"prompt": ["I love", "the rain", "a"], "max_tokens": 100, "temperature": 0});
    let whole = || {
        let (status, _, answer) = server.request("POST", "/v1/completions", key, &body.to_string());
        assert_eq!(status, 200, "{answer}");
        let found: Value = serde_json::from_str(&answer).unwrap();
        let choices = found["choices"].as_array().unwrap().iter();
        choices.map(|choice| choice["text"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let old = whole();
    overwrite(&dir, "transformer.h.1.mlp.c_proj.bias", 100.0);
    tk().args(["export", "--quiet"]).arg(&dir).assert().success();

    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    let streamed = streamed.to_string();
    // the texts of each stream that has ended, in the order of their ends
    let (stop, ended) = (AtomicBool::new(false), Mutex::new(Vec::new()));
    let ask = || {
        while !stop.load(Ordering::Relaxed) {
            let (status, _, body) = server.request("POST", "/v1/completions", key, &streamed);
            let mut texts = vec![String::new(); old.len()];
            let mut over = 0;
            for event in events(&body) {
                let choice = &event["choices"][0];
                texts[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
                over += usize::from(choice["finish_reason"].is_string());
            }
            ended.lock().unwrap().push((status, over, texts));
        }
    };
    let reloads = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..3).map(|_| scope.spawn(ask)).collect();
        let more = |count: usize| {
            let before = ended.lock().unwrap().len();
            let going = || clients.iter().all(|client| !client.is_finished());
            while ended.lock().unwrap().len() < before + count && going() {
                std::thread::yield_now();
            }
        };
        let reloads: Vec<u16> = (0..3)
            .map(|_| {
                more(4);
                server.request("POST", "/models/tiny-gpt2-lm/reload", key, "").0
            })
            .collect();
        more(4);
        stop.store(true, Ordering::Relaxed);
        reloads
    });
    assert_eq!(reloads, [200, 200, 200]);
    let new = whole();
    assert_ne!(old, new);
    // each is whole, and one model's from its first token to its last
    for (status, over, texts) in ended.into_inner().unwrap() {
        assert_eq!((status, over), (200, old.len()), "{texts:?}");
        assert!(texts == old || texts == new, "{texts:?}, expected {old:?} or {new:?}");
    }
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn each_model_runs_the_precision_that_is_asked_of_it() {
    let (_a, labels) = exported("tiny-bert-single");
    let (_b, tagger) = exported("tiny-bert-tokens");
    for dir in [&labels, &tagger] {
        tk().args(["export", "--precision", "int8", "--quiet"]).arg(dir).assert().success();
    }
    let int8 = |text: &str| {
        let input = format!("{}\n", json!({"text": text}));
        let mut run = tk();
        run.arg("serve-batch").arg(&labels).args(["--precision", "int8", "--input", "-"]);
        let out = run.write_stdin(input).assert().success();
        serde_json::from_slice::<Value>(&out.get_output().stdout).unwrap()
    };
    let text = TEXTS[0];
    let (fp32, int8) = (batch(&labels, &[json!({"text": text})]).remove(0), int8(text));
    assert_ne!(fp32["scores"], int8["scores"]);
    for (args, types, wanted) in [
        (&["--precision", "tiny-bert-single=int8"][..], ["int8", "fp32"], &int8),
        (&["--precision", "int8", "--precision", "tiny-bert-single=fp32"], ["fp32", "int8"], &fp32),
        (&["--precision", "tiny-bert-tokens=int8,fp32,tiny-bert-single=int8"], ["int8", "int8"], &int8),
    ] {
        let server = Server::start(&[&labels, &tagger], args);
        let about = server.get("/info").1;
        let found: Vec<&Value> =
            about["models"].as_array().unwrap().iter().map(|model| &model["model_dtype"]).collect();
        assert_eq!(found, types, "{args:?}");
        let (status, found) = server.post("/models/tiny-bert-single/predict", json!({"inputs": text}));
        assert_eq!(status, 200, "{found}");
        for label in found.as_array().unwrap() {
            assert_near(&label["score"], &wanted["scores"][label["label"].as_str().unwrap()], "a score");
        }
    }
    let path = labels.to_str().unwrap();
    for (asked, says) in [
        ("other=int8", "there is no model other; there is tiny-bert-single"),
        ("int9", "is no precision, expected fp32"),
        ("tiny-bert-single=q4", "q4"),
    ] {
        let out = tk().args(["serve", path, "--precision", asked]).assert().code(2);
        let text = String::from_utf8(out.get_output().stderr.clone()).unwrap();
        assert!(text.contains(says), "{text}");
    }
}

#[test]
fn without_a_key_nobody_loads_a_model_anew_by_http() {
    let (_guard, dir) = exported("tiny-gpt2-lm");
    let server = Server::start(&[&dir], &[]);
    let (status, found) = server.post("/models/tiny-gpt2-lm/reload", json!({}));
    assert_eq!(status, 403, "{found}");
    assert!(found["error"].as_str().unwrap().contains("send the process a SIGHUP"), "{found}");
}

#[test]
fn the_page_needs_no_key_and_nothing_from_elsewhere() {
    let (guard, dir) = exported("tiny-bert-single");
    let file = guard.path().join("key");
    std::fs::write(&file, "secret\n").unwrap();
    let server = Server::start(&[&dir], &["--api-key-file", file.to_str().unwrap()]);
    for (path, form) in [("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")] {
        let (status, head, body) = server.request("GET", path, "", "");
        let head = head.to_lowercase();
        assert_eq!(status, 200, "{head}");
        for says in [
            &format!("content-type: {form}; charset=utf-8"),
            "x-content-type-options: nosniff",
            "content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'",
        ] {
            assert!(head.contains(says), "{path}: {head}");
        }
        assert!(!head.contains("unsafe") && !body.contains("://") && !body.contains("innerHTML"), "{path}");
    }
    // what the page asks for is for whoever has the key
    assert_eq!(server.get("/info").0, 401);
    assert_eq!(server.request("GET", "/info", "Authorization: Bearer secret\r\n", "").0, 200);
}

/// The paths that the table of routes in the documentation names.
fn paths_in_the_book() -> BTreeSet<String> {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/src/commands/serve.md");
    let text = std::fs::read_to_string(page).unwrap();
    let table = text.split("\n| route | ").nth(1).unwrap().split("\n\n").next().unwrap();
    let routes = table.lines().skip(2).filter_map(|line| line.split(" | ").next());
    let paths = routes.flat_map(|cell| cell.split('`')).filter(|text| text.starts_with('/'));
    paths.map(|path| path.replace("NAME", "{model}")).collect()
}

#[test]
fn the_document_the_book_and_the_server_name_the_same_addresses() {
    let (_guard, dir) = exported("tiny-bert-single");
    let server = Server::start(&[&dir], &[]);
    let paths = server.document()["paths"].as_object().unwrap();
    for (path, item) in paths {
        for method in item.as_object().unwrap().keys() {
            let path = path.replace("{model}", "tiny-bert-single").replace("{version}", "1");
            let (status, _, body) = server.request(&method.to_uppercase(), &path, "", "{}");
            assert!(![404, 405].contains(&status), "{method} {path}: {status} {body}");
        }
    }
    // those that are asked of all models stand for those of one, and those of a model for those of its only version
    let of_all = |path: &&String| {
        let of_one = path.strip_prefix("/models/{model}").is_some_and(|rest| paths.contains_key(rest));
        let of_version = path.contains("/versions/{version}");
        !(of_one || of_version && paths.contains_key(&path.replace("/versions/{version}", "")))
    };
    let documented: BTreeSet<String> = paths.keys().filter(of_all).cloned().collect();
    assert_eq!(documented, paths_in_the_book());
    let (status, head, _) = server.request("DELETE", "/predict", "", "");
    assert!(status == 405 && head.contains("allow: POST"), "{head}");
    // a name that is no UTF-8 is the name of no model
    let (status, _, body) = server.request("GET", "/v2/models/%ff", "", "");
    assert!(status == 404 && body.contains("there is no model"), "{body}");
    assert!(server.document()["components"]["securitySchemes"].is_null());
}

#[test]
fn a_key_is_asked_for_where_the_server_has_one() {
    let (guard, dir) = exported("tiny-bert-single");
    let file = guard.path().join("key");
    std::fs::write(&file, "secret\n").unwrap();
    let server = Server::start(&[&dir], &["--api-key-file", file.to_str().unwrap()]);
    let ask = |headers: &str| server.request("POST", "/predict", headers, "{\"inputs\": \"a\"}").0;
    let document = server.document();
    assert_eq!(document["components"]["securitySchemes"]["key"]["scheme"], "bearer");
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let (status, ..) = server.request(
                &method.to_uppercase(),
                &path.replace("{model}", "tiny-bert-single").replace("{version}", "1"),
                "",
                "{}",
            );
            assert_eq!(status == 401, operation["security"].is_array(), "{method} {path}: {status}");
        }
    }
    assert_eq!(
        (ask(""), ask("Authorization: Bearer other\r\n"), ask("Authorization: Bearer secre\r\n")),
        (401, 401, 401)
    );
    assert_eq!(ask("Authorization: Bearer secret\r\n"), 200);
    assert_eq!(server.get("/info").0, 401);
    // whoever watches over the process has no key
    assert_eq!((server.get("/live").0, server.get("/health").0, server.get("/metrics").0), (200, 200, 200));
    let (_, head, _) = server.request("POST", "/predict", "x-request-id: mine\r\n", "{\"inputs\": \"a\"}");
    assert!(head.to_lowercase().contains("x-request-id: mine"), "{head}");
}

#[test]
fn what_was_taken_is_answered_before_the_server_ends() {
    let (_guard, dir) = exported("tiny-bert-single");
    let server = Server::start(&[&dir], &["--threads", "1", "--max-batch-tokens", "8"]);
    let body = json!({"inputs": vec![["a good day and night"]; 200]}).to_string();
    let mut clients: Vec<TcpStream> = (0..2)
        .map(|_| {
            let mut stream = TcpStream::connect(&server.address).unwrap();
            let head = format!(
                "POST /predict HTTP/1.1\r\nHost: tk\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
            stream
        })
        .collect();
    // both are in: their records wait, or are answered already
    loop {
        let (_, text) = server.get("/metrics");
        let text = text.as_str().unwrap().to_owned();
        let count = |name: &str| -> u64 {
            let line = text.lines().find(|line| line.starts_with(name));
            line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_default()
        };
        if count("tk_records_total") + count("tk_waiting_records{") >= 400 - 1 {
            break;
        }
    }
    assert_eq!(server.stop(), Some(0));
    for client in &mut clients {
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let body = answer.split_once("\r\n\r\n").unwrap().1;
        let found: Value = serde_json::from_str(body).unwrap();
        assert_eq!(found.as_array().unwrap().len(), 200);
    }
}

#[test]
fn a_server_that_is_asked_to_end_as_soon_as_it_listens_ends_well() {
    let (_guard, dir) = exported("tiny-bert-single");
    for _ in 0..8 {
        assert_eq!(Server::start(&[&dir], &["--threads", "1"]).stop(), Some(0));
    }
}

/// The events of a stream, but for the last one, which says that it is over.
fn events(body: &str) -> Vec<Value> {
    let mut lines: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(lines.pop(), Some("[DONE]"), "{body}");
    lines.into_iter().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn texts_are_those_of_serve_batch_whole_and_as_they_come() {
    let (_guard, dir) = exported("tiny-gpt2-lm");
    let server = Server::start(&[&dir], &["--slots", "3"]);
    let prompts = ["I love", "the rain", "a", "sun at night and rain"];
    let records = prompts.map(|prompt| json!({"prompt": prompt, "max_new_tokens": 12}));
    let wanted: Vec<String> =
        batch(&dir, &records).iter().map(|answer| answer["text"].as_str().unwrap().to_owned()).collect();
    let body = json!({"prompt": prompts, "max_tokens": 12, "temperature": 0, "model": "tiny-gpt2-lm"});
    let (status, found) = server.post("/v1/completions", body.clone());
    assert_eq!(status, 200, "{found}");
    let texts: Vec<&str> =
        found["choices"].as_array().unwrap().iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts, wanted);
    assert!(found["usage"]["completion_tokens"].as_u64().unwrap() > 4, "{found}");

    let mut streamed = body;
    streamed["stream"] = json!(true);
    streamed["stream_options"] = json!({"include_usage": true});
    let (status, head, body) = server.request("POST", "/v1/completions", "", &streamed.to_string());
    assert!(status == 200 && head.contains("text/event-stream"), "{head}");
    let mut events = events(&body);
    assert_eq!(events.pop().unwrap()["usage"], found["usage"]);
    let mut texts = vec![String::new(); prompts.len()];
    let mut ends = vec![Value::Null; prompts.len()];
    for event in &events {
        let choice = &event["choices"][0];
        let index = choice["index"].as_u64().unwrap() as usize;
        texts[index] += choice["text"].as_str().unwrap();
        ends[index] = choice["finish_reason"].clone();
    }
    assert_eq!(texts, wanted);
    assert!(
        events.len() > prompts.len() && ends.iter().all(|end| end == "length" || end == "stop"),
        "{body}"
    );

    // a seed repeats, and what is drawn differs without one
    let drawn = |seed: Value| {
        let body = json!({"prompt": "a", "max_tokens": 20, "n": 2, "seed": seed});
        let (status, found) = server.post("/v1/completions", body);
        assert_eq!(status, 200, "{found}");
        found["choices"].clone()
    };
    assert_eq!(drawn(json!(7)), drawn(json!(7)));
    assert_ne!(drawn(Value::Null), drawn(Value::Null));
    let (_, echoed) = server
        .post("/v1/completions", json!({"prompt": "a", "echo": true, "temperature": 0, "max_tokens": 3}));
    assert!(echoed["choices"][0]["text"].as_str().unwrap().starts_with('a'), "{echoed}");

    for (body, says) in [
        (json!({}), "missing field `prompt`"),
        (json!({"prompt": 7}), "prompt: expected one or a list"),
        (json!({"prompt": "a", "model": 7}), "model: invalid type: integer `7`, expected a string"),
        (json!({"prompt": []}), "there is no prompt in it"),
        (json!({"prompt": "a", "logprobs": 6}), "logprobs is 6, expected 0 to 5"),
        (json!({"prompt": "a", "logprobs": 1, "stream": true}), "not with \\\"stream\\\""),
        (json!({"prompt": "a", "logprobs": 1, "num_beams": 2}), "a beam search tells none"),
        (json!({"prompt": "a", "max_tokens": 0}), "max_tokens is 0"),
        (json!({"prompt": "a", "temperature": "hot"}), "temperature is"),
        (json!({"prompt": "a ".repeat(500)}), "leave room for a new one"),
        (json!({"prompt": "a", "model": "other"}), "there is no model"),
    ] {
        let (status, _, answer) = server.request("POST", "/v1/completions", "", &body.to_string());
        assert!((400..500).contains(&status) && answer.contains(says), "{body}: {status} {answer}");
    }
    let (status, found) = server.post("/predict", json!({"inputs": "a"}));
    assert_eq!(status, 424, "{found}");
    assert!(found["error"].as_str().unwrap().contains("ask it by /v1/completions"), "{found}");

    // clients that go leave their places: more of them than there are
    for _ in 0..60 {
        let body = json!({"prompt": "a", "max_tokens": 60, "stream": true}).to_string();
        let mut stream = TcpStream::connect(&server.address).unwrap();
        let head =
            format!("POST /v1/completions HTTP/1.1\r\nHost: tk\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    }
    assert_eq!(server.post("/v1/completions", json!({"prompt": "a", "temperature": 0})).0, 200);
    assert_eq!(server.stop(), Some(0));
}

/// The log-softmax of each row (T, V) of the logits that `transformers` has computed for a record of the reference.
fn reference_logprobs(record: usize) -> (String, Vec<u32>, Vec<Vec<f64>>) {
    let dir = models("tiny-gpt2-lm");
    let reference: Value =
        serde_json::from_slice(&std::fs::read(dir.join("reference.json")).unwrap()).unwrap();
    let ids: Vec<u32> = serde_json::from_value(reference["ids"][record].clone()).unwrap();
    let bytes = std::fs::read(dir.join("logits.safetensors")).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let logits = tensors.tensor(&record.to_string()).unwrap();
    let width = *logits.shape().last().unwrap();
    let numbers: Vec<f64> =
        logits.data().as_chunks().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes))).collect();
    let rows = numbers.chunks_exact(width).map(|row| {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|x| (x - max).exp()).sum();
        row.iter().map(|x| x - max - sum.ln()).collect()
    });
    (reference["records"][record]["text"].as_str().unwrap().to_owned(), ids, rows.collect())
}

#[test]
fn logprobs_are_those_of_transformers() {
    let (_guard, dir) = exported("tiny-gpt2-lm");
    let server = Server::start(&[&dir], &["--slots", "3"]);
    let tokenizer = tk::data::tokens::Tokenizer::open(&dir).unwrap();
    let near = |found: &Value, wanted: f64, place: &str| {
        assert!((found.as_f64().unwrap() - wanted).abs() < 1e-4, "{place}: {found} and {wanted}");
    };
    let list = |value: &Value| value.as_array().unwrap().clone();
    for record in [0, 3, 4, 5, 7] {
        let (prompt, ids, truth) = reference_logprobs(record);
        let ask = |more: Value| {
            let mut body = json!({"prompt": prompt, "temperature": 0});
            body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            let (status, found) = server.post("/v1/completions", body);
            assert_eq!(status, 200, "{found}");
            found
        };
        // the prompt alone, scored
        let found = ask(json!({"max_tokens": 0, "echo": true, "logprobs": 2}));
        assert_eq!(
            found["usage"],
            json!({"prompt_tokens": ids.len(), "completion_tokens": 0, "total_tokens": ids.len()})
        );
        let (choice, logprobs) = (&found["choices"][0], &found["choices"][0]["logprobs"]);
        assert_eq!((&choice["text"], &choice["finish_reason"]), (&json!(prompt), &json!("length")));
        let (scored, top) = (list(&logprobs["token_logprobs"]), list(&logprobs["top_logprobs"]));
        let (offsets, tokens) = (list(&logprobs["text_offset"]), list(&logprobs["tokens"]));
        assert_eq!([scored.len(), top.len(), offsets.len(), tokens.len()], [ids.len(); 4]);
        assert!(scored[0].is_null() && top[0].is_null() && offsets[0] == 0);
        let characters: Vec<char> = prompt.chars().collect();
        for i in 1..ids.len() {
            near(&scored[i], truth[i - 1][ids[i] as usize], &format!("token {i}"));
            let best = truth[i - 1].iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let told = top[i].as_object().unwrap();
            near(told.values().next().unwrap(), best, &format!("the best at {i}"));
            assert!((2..=3).contains(&told.len()), "{told:?}");
            let name = tokenizer.inner().decode(&[ids[i]], false).unwrap();
            assert_eq!(tokens[i], name);
            let behind: String = characters[offsets[i].as_u64().unwrap() as usize..].iter().collect();
            assert!(behind.starts_with(&name) || name.contains('\u{fffd}'), "{i}: {name:?} in {behind:?}");
        }
        // and with what follows, whose first token stands behind the last row
        let found = ask(json!({"max_tokens": 4, "echo": true, "logprobs": 0}));
        let all = list(&found["choices"][0]["logprobs"]["token_logprobs"]);
        assert_near(&json!(all[..ids.len()]), &json!(scored), "the same prompt");
        let best = |row: &[f64]| row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if let Some(first) = all.get(ids.len()) {
            near(first, best(truth.last().unwrap()), "the first new token");
        }
        let found = ask(json!({"max_tokens": 4, "logprobs": 1}));
        let new = &found["choices"][0]["logprobs"];
        assert_near(&new["token_logprobs"], &json!(all[ids.len()..]), "without its prompt");
        assert_eq!(list(&new["tokens"]).len() as u64, found["usage"]["completion_tokens"].as_u64().unwrap());
        assert!(list(&new["text_offset"]).first().is_none_or(|offset| offset == 0));
        assert!(ask(json!({"max_tokens": 4}))["choices"][0]["logprobs"].is_null());
    }
    // a prompt that others have read is scored all the same, and a penalty is none of the model's
    let (prompt, ids, truth) = reference_logprobs(3);
    let long = prompt.repeat(5);
    let body = json!({"prompt": [long, long], "max_tokens": 0, "echo": true, "logprobs": 0,
                      "repetition_penalty": 3, "temperature": 2});
    let (_, found) = server.post("/v1/completions", body);
    for choice in found["choices"].as_array().unwrap() {
        let scored = list(&choice["logprobs"]["token_logprobs"]);
        assert_eq!(2 * scored.len() as u64, found["usage"]["prompt_tokens"].as_u64().unwrap());
        assert!(scored.len() > 32, "so that it is worth copying");
        for i in 1..ids.len() {
            near(&scored[i], truth[i - 1][ids[i] as usize], &format!("token {i}"));
        }
    }
}

/// The entries of a log, each with a time, a level and a message.
fn entries(log: &str) -> Vec<Value> {
    let entry = |line: &str| {
        let entry: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        let time = entry["time"].as_str().unwrap();
        assert!(time.len() == "2026-01-01T00:00:00.000000Z".len() && time.ends_with('Z'), "{line}");
        assert!(time[..19].bytes().enumerate().all(|(i, byte)| match i {
            4 | 7 => byte == b'-',
            10 => byte == b'T',
            13 | 16 => byte == b':',
            _ => byte.is_ascii_digit(),
        }));
        assert!(entry["message"].is_string() && entry["level"].is_string(), "{line}");
        entry
    };
    log.lines().map(entry).collect()
}

#[test]
fn a_log_in_json_is_an_object_a_line_and_tells_of_each_request() {
    let (_a, dir) = exported("tiny-bert-single");
    let (_b, speaker) = exported("tiny-gpt2-lm");
    let server = Server::start_loud(&[&dir, &speaker], &["--log-format", "json", "--max-body", "4000"]);
    let path = "/models/tiny-bert-single/predict";
    let ask = |path: &str, headers: &str, body: Value| {
        let (status, head, _) = server.request("POST", path, headers, &body.to_string());
        let id = head.lines().find_map(|line| line.strip_prefix("x-request-id: ")).unwrap().to_owned();
        (status, id)
    };
    let mut asked = vec![
        ask(path, "x-request-id: mine \"1\"\r\n", json!({"inputs": [["a good"], ["day"]]})),
        ask(path, "", json!({"inputs": 7})),
        ask(path, &format!("x-request-id: {}\r\n", "x".repeat(129)), json!({"inputs": "a"})),
        ask("/v1/completions", "x-request-id: \u{e9}\r\n", json!({"prompt": "a", "max_tokens": 2})),
        ask(
            "/v2/models/tiny-bert-single/infer",
            "",
            json!({"inputs": [
            {"name": "input_ids", "datatype": "INT64", "shape": [2, 2], "data": [2, 3, 2, 3]}]}),
        ),
        ask("/predict", "", json!({"inputs": "a", "model": "x".repeat(3000)})),
        ask("/models/line%0abreak/predict", "", json!({"inputs": "a"})),
    ];
    let log = server.stop_for_log();
    let all = entries(&log);
    assert!(all.iter().any(|entry| entry["message"].as_str().unwrap().starts_with("listening on")), "{log}");
    let told: Vec<&Value> = all.iter().filter(|entry| entry["id"].is_string()).collect();
    let ids: Vec<(u16, String)> = (told.iter())
        .map(|entry| (entry["status"].as_u64().unwrap() as u16, entry["id"].as_str().unwrap().to_owned()))
        .collect();
    assert_eq!(ids, asked, "{log}");
    // what is too long, or no text, is not taken over; all names differ
    assert_eq!(asked[0], (200, "mine \"1\"".to_owned()));
    asked.sort_unstable_by(|a, b| a.1.cmp(&b.1));
    asked.dedup_by(|a, b| a.1 == b.1);
    assert!(asked.len() == told.len() && asked.iter().all(|(_, id)| id.len() <= 128 && id.is_ascii()));
    for entry in &told {
        assert_eq!(entry["method"], "POST");
        assert!(entry["seconds"].as_f64().unwrap() > 0.0 && entry["level"] == "info", "{entry}");
        assert_eq!(entry["error"].is_string(), entry["status"] != 200, "{entry}");
    }
    let work = |i: usize| ["path", "model", "texts", "tokens"].map(|name| told[i][name].clone());
    assert_eq!(work(0)[..3], [json!(path), json!("tiny-bert-single"), json!(2)]);
    assert!(work(0)[3].as_u64().unwrap() >= 6, "{log}");
    assert!(told[1]["error"].as_str().unwrap().starts_with("inputs: expected a text"));
    assert_eq!(work(3)[..3], [json!("/v1/completions"), json!("tiny-gpt2-lm"), json!(1)]);
    assert_eq!(work(4)[1..], [json!("tiny-bert-single"), json!(2), json!(4)]);
    assert!(told[5]["error"].as_str().unwrap().len() <= 512, "{log}");
    assert_eq!(told[6]["path"], "/models/line%0abreak/predict");
}

#[test]
fn what_ends_the_server_is_in_its_log_and_text_tells_of_requests_where_more_is_asked_for() {
    let out = tk().args(["serve", "none", "--log-format", "json"]).assert().code(2);
    let log = String::from_utf8(out.get_output().stderr.clone()).unwrap();
    let [entry] = &entries(&log)[..] else { panic!("{log}") };
    assert!(entry["level"] == "error" && entry["message"].as_str().unwrap().contains("none"), "{log}");

    let (_guard, dir) = exported("tiny-bert-single");
    let log = |args: &[&str]| {
        let server = Server::start_loud(&[&dir], args);
        assert_eq!(server.post("/predict", json!({"inputs": "a"})).0, 200);
        server.stop_for_log()
    };
    assert_eq!(log(&["--log-format", "json", "--quiet"]), "");
    let (text, verbose) = (log(&[]), log(&["--log-format", "text", "-v"]));
    assert!(text.contains("\nlistening on http://") && !text.contains("{\"request\""), "{text}");
    let line = verbose.lines().find(|line| line.starts_with("{\"request\"")).unwrap();
    let line: Value = serde_json::from_str(line).unwrap();
    assert_eq!((&line["route"], &line["status"]), (&json!("/predict"), &json!(200)));
}

#[test]
fn a_client_that_never_ends_its_request_holds_nothing_up() {
    let (_guard, dir) = exported("tiny-bert-single");
    let server = Server::start(&[&dir], &["--timeout", "0.2"]);
    let half = |head: &str| {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream.write_all(head.as_bytes()).unwrap();
        stream
    };
    // the body never comes: the request is given up
    let mut waiting = half("POST /predict HTTP/1.1\r\nHost: tk\r\nContent-Length: 50\r\n\r\n{\"inputs\"");
    let mut answer = [0; 12];
    waiting.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"HTTP/1.1 503");
    // nor does the end of a head: the server ends all the same
    let _held = half("POST /predict HTTP/1.1\r\nHost");
    assert_eq!(server.post("/predict", json!({"inputs": "a"})).0, 200);
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn where_there_is_no_room_clients_are_told_to_come_again() {
    let (_guard, dir) = exported("tiny-bert-single");
    let server = Server::start(&[&dir], &["--max-queue", "4", "--max-records", "100"]);
    // no request has more records than the queue
    let (status, answer) = server.post("/predict", json!({"inputs": vec![["a"]; 5]}));
    assert_eq!(status, 413, "{answer}");
    assert_eq!(server.post("/predict", json!({"inputs": vec![["a"]; 4]})).0, 200);
    let refused = |args: &[&str], says: &str| {
        let out = tk().arg("serve").args(args).assert().code(2);
        let text = String::from_utf8(out.get_output().stderr.clone()).unwrap();
        assert!(text.contains(says), "{text}");
    };
    let dir = dir.to_str().unwrap();
    refused(&[dir, dir], "two models are called tiny-bert-single");
    refused(&[&format!("a/b={dir}")], "can't stand in an address");
    refused(&[&format!("..={dir}")], "can't stand in an address");
    refused(&["none"], "none");
    refused(&[dir, "--timeout", "0"], "expected a number of seconds above 0");
    refused(&[dir, "--listen", &server.address], "--listen");
    refused(&[dir, "--slots", "3"], "--slots is for language models");
    refused(&[models("tiny-gpt2-lm").to_str().unwrap()], "is not there: run `tk export");
    refused(&[models("tiny-bert-single").to_str().unwrap()], "is not there: run `tk export");
}
