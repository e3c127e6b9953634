//! The Open Inference Protocol of `tk serve`, the real binary on the tiny models: tensors give what the graph gives in ONNX
//! Runtime and texts what `tk serve-batch` answers, in JSON and as binary data, and what does not fit is refused.

mod common;

use std::path::Path;

use common::server::{Server, TEXTS, assert_near, batch, exported};
use serde_json::{Value, json};
use tk::data::batch::{Encoding, PaddedBatch};
use tk::data::tokens::Tokenizer;
use tk::runtime::{Model, OrtSession, Provider, Providers, Threads};
use tk::say::Say;

fn encodings(dir: &Path) -> Vec<Encoding> {
    let tokenizer = Tokenizer::open(dir).unwrap();
    let texts = TEXTS.iter().map(|text| tokenizer.encode(text, None, 32).unwrap());
    texts.filter(|encoding| !encoding.is_empty()).collect()
}

/// A batch as the tensors of a request, of the inputs that a model says it takes.
fn tensors(server: &Server, model: &str, batch: &PaddedBatch) -> Vec<Value> {
    let (status, about) = server.get(&format!("/v2/models/{model}"));
    assert_eq!(status, 200, "{about}");
    let inputs = about["inputs"].as_array().unwrap().iter().filter(|input| input["datatype"] == "INT64");
    let tensor = |input: &Value| {
        assert_eq!(input["shape"], json!([-1, -1]));
        let data = match input["name"].as_str().unwrap() {
            "input_ids" => &batch.ids,
            "attention_mask" => &batch.mask,
            "token_type_ids" => &batch.type_ids,
            other => panic!("{other}"),
        };
        let (shape, name) = ([batch.rows, batch.width], &input["name"]);
        json!({"name": name, "datatype": "INT64", "shape": shape, "data": data})
    };
    inputs.map(tensor).collect()
}

fn infer(server: &Server, model: &str, body: &Value) -> Value {
    let (status, found) = server.post(&format!("/v2/models/{model}/infer"), body.clone());
    assert_eq!(status, 200, "{found}");
    found
}

/// A request whose tensors stand behind its JSON, and its answer's JSON with the bytes behind that.
fn infer_binary(server: &Server, model: &str, json: &Value, behind: &[u8]) -> (Value, Vec<u8>) {
    let (json, path) = (json.to_string(), format!("/v2/models/{model}/infer"));
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: tk\r\nConnection: close\r\nContent-Length: {}\r\n\
         Inference-Header-Content-Length: {}\r\n\r\n",
        json.len() + behind.len(),
        json.len()
    );
    let (status, head, body) = server.send_for_bytes(&[head.as_bytes(), json.as_bytes(), behind].concat());
    assert_eq!(status, 200, "{}", String::from_utf8_lossy(&body));
    server.assert_documented("POST", &path, &(status, head.clone(), String::new()));
    let length = head.lines().find_map(|line| line.strip_prefix("inference-header-content-length: "));
    let (json, behind) = body.split_at(length.unwrap().parse().unwrap());
    (serde_json::from_slice(json).unwrap(), behind.to_vec())
}

fn without_data(tensor: &Value, size: usize) -> Value {
    let mut tensor = tensor.clone();
    tensor.as_object_mut().unwrap().shift_remove("data");
    tensor["parameters"] = json!({"binary_data_size": size});
    tensor
}

#[test]
fn tensors_give_what_the_graph_gives() {
    for name in [
        "tiny-bert-single",
        "tiny-distilbert-single",
        "tiny-roberta-single",
        "tiny-gpt2-single",
        "tiny-bert-tokens",
        "tiny-bert-answers",
        "tiny-bert-masked",
        "tiny-bert-pretraining",
        "tiny-bert-embedding",
    ] {
        let (_guard, dir) = exported(name);
        let server = Server::start(&[&dir], &["--threads", "2"]);
        let encodings = encodings(&dir);
        let batch = PaddedBatch::new(&encodings.iter().collect::<Vec<_>>(), 0);
        let inputs = tensors(&server, name, &batch);
        let found = infer(&server, name, &json!({"id": "7", "inputs": inputs}));
        assert_eq!((&found["model_name"], &found["id"]), (&json!(name), &json!("7")));

        let providers = Providers::only(Provider::Cpu);
        let graph = dir.join("onnx/model.onnx");
        let session = OrtSession::open(Model::File(&graph), &providers, Threads::Apart(1), Say::default());
        let wanted = session.unwrap().run(&batch).unwrap();
        let about = server.get(&format!("/v2/models/{name}")).1;
        let told: Vec<&Value> = about["outputs"].as_array().unwrap().iter().skip(1).collect();
        let outputs = found["outputs"].as_array().unwrap();
        assert_eq!((outputs.len(), told.len()), (wanted.len(), wanted.len()), "{name}");
        for ((output, told), wanted) in outputs.iter().zip(told).zip(&wanted) {
            assert_eq!((&output["name"], &output["datatype"]), (&json!(wanted.name), &json!("FP32")));
            assert_eq!((&told["name"], &told["datatype"]), (&output["name"], &output["datatype"]));
            let shape = wanted.array.shape();
            assert_eq!(output["shape"], json!(shape), "{name}");
            let any = told["shape"].as_array().unwrap().iter().zip(shape);
            assert!(any.clone().count() == shape.len() && any.clone().all(|(a, b)| *a == -1 || *a == *b));
            let of_token = shape.get(1) == Some(&batch.width);
            let per = wanted.array.len() / if of_token { batch.rows * batch.width } else { batch.rows };
            for (i, (x, y)) in output["data"].as_array().unwrap().iter().zip(&wanted.array).enumerate() {
                let x = x.as_f64().unwrap() as f32;
                // padding has no numbers
                let y = if of_token && batch.mask[i / per] == 0 { 0.0 } else { *y };
                assert!(
                    (x - y).abs() <= 1e-4 * y.abs().max(1.0),
                    "{name}, {}, {i}: {x} and {y}",
                    wanted.name
                );
            }
        }
        // a row alone, without padding and without what may lack, is the same as among others
        for (i, encoding) in encodings.iter().enumerate() {
            let alone = json!({"inputs": [
                {"name": "input_ids", "datatype": "INT64", "shape": [1, encoding.len()], "data": [encoding.ids]},
            ]});
            let alone = infer(&server, name, &alone);
            for (one, all) in alone["outputs"].as_array().unwrap().iter().zip(outputs) {
                let all = all["data"].as_array().unwrap();
                let own =
                    all[i * all.len() / batch.rows..].iter().take(one["data"].as_array().unwrap().len());
                for (x, y) in one["data"].as_array().unwrap().iter().zip(own) {
                    assert!((x.as_f64().unwrap() - y.as_f64().unwrap()).abs() < 1e-4, "{name}: {x} and {y}");
                }
            }
        }
        // those that are asked for, in that order
        let names: Vec<&Value> = outputs.iter().rev().map(|output| &output["name"]).collect();
        let asked: Vec<Value> = names.iter().map(|name| json!({"name": name})).collect();
        let found = infer(&server, name, &json!({"inputs": inputs, "outputs": asked}));
        let found = found["outputs"].as_array().unwrap();
        assert!(found.iter().zip(names).all(|(output, name)| output["name"] == *name), "{found:?}");
        assert_near(&found[0]["data"], &outputs[outputs.len() - 1]["data"], name);
    }
}

#[test]
fn logits_are_those_of_serve_batch_in_every_form_of_the_data() {
    let (_guard, dir) = exported("tiny-bert-single");
    let server = Server::start(&[&dir], &[]);
    let name = "tiny-bert-single";
    let encodings = encodings(&dir);
    let padded = PaddedBatch::new(&encodings.iter().collect::<Vec<_>>(), 0);
    let plain = tensors(&server, name, &padded);
    let wanted = infer(&server, name, &json!({"inputs": plain}))["outputs"][0]["data"].clone();

    // the logits that serve-batch tells
    let input: String = TEXTS.iter().map(|text| format!("{}\n", json!({"text": text}))).collect();
    let mut run = common::tk();
    run.arg("serve-batch").arg(&dir).args(["--logits", "--input", "-"]);
    let out = run.write_stdin(input).assert().success();
    let lines = String::from_utf8(out.get_output().stdout.clone()).unwrap();
    let logits = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["logits"].clone());
    let logits: Vec<Value> = logits.flat_map(|row| row.as_array().unwrap().clone()).collect();
    assert_near(&wanted, &Value::Array(logits), "logits");

    // lists of lists, and integers of 4 bytes
    let nested: Vec<Value> = (plain.iter().cloned())
        .map(|mut tensor| {
            let rows = tensor["data"].as_array().unwrap().chunks(padded.width).map(<[Value]>::to_vec);
            tensor["data"] = json!(rows.collect::<Vec<_>>());
            tensor["datatype"] = json!("INT32");
            tensor
        })
        .collect();
    assert_near(&infer(&server, name, &json!({"inputs": nested}))["outputs"][0]["data"], &wanted, "nested");

    // binary data, in and out
    let numbers = |tensor: &Value| -> Vec<i64> {
        tensor["data"].as_array().unwrap().iter().map(|x| x.as_i64().unwrap()).collect()
    };
    for (datatype, size) in [("INT64", 8), ("INT32", 4)] {
        let (mut inputs, mut behind) = (Vec::new(), Vec::new());
        for tensor in &plain {
            let mut bare = without_data(tensor, numbers(tensor).len() * size);
            bare["datatype"] = json!(datatype);
            inputs.push(bare);
            behind.extend(numbers(tensor).iter().flat_map(|x| x.to_le_bytes()[..size].to_vec()));
        }
        for body in [
            json!({"inputs": inputs, "parameters": {"binary_data_output": true}}),
            json!({"inputs": inputs, "outputs": [{"name": "logits", "parameters": {"binary_data": true}}]}),
        ] {
            let (json, bytes) = infer_binary(&server, name, &body, &behind);
            let output = &json["outputs"][0];
            assert_eq!(output["parameters"]["binary_data_size"], bytes.len());
            assert!(output.get("data").is_none() && output["datatype"] == "FP32", "{output}");
            let found = bytes.as_chunks().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes)));
            assert_near(&json!(found.collect::<Vec<_>>()), &wanted, datatype);
        }
        // an output can be wanted in the JSON all the same
        let body = json!({"inputs": inputs, "outputs": [{"name": "logits", "parameters": {"binary_data": false}}],
                          "parameters": {"binary_data_output": true}});
        let head = format!("Inference-Header-Content-Length: {}\r\n", body.to_string().len());
        let whole = [body.to_string().as_bytes(), &behind].concat();
        let head = format!(
            "POST /v2/models/{name}/infer HTTP/1.1\r\nHost: tk\r\nConnection: close\r\n{head}Content-Length: {}\r\n\r\n",
            whole.len()
        );
        let (status, _, body) = server.send(&[head.as_bytes(), &whole].concat());
        assert_eq!(status, 200, "{body}");
        let found: Value = serde_json::from_str(&body).unwrap();
        assert_near(&found["outputs"][0]["data"], &wanted, "JSON");
    }
}

#[test]
fn texts_are_answered_as_by_serve_batch() {
    let (_guard, dir) = exported("tiny-bert-single");
    let server = Server::start(&[&dir], &[]);
    let name = "tiny-bert-single";
    let wanted = batch(&dir, &TEXTS.map(|text| json!({"text": text})));
    let input =
        |texts: Value| json!({"name": "text", "datatype": "BYTES", "shape": [TEXTS.len()], "data": texts});
    let scores = |answer: &str| serde_json::from_str::<Value>(answer).unwrap()["scores"].clone();
    let held = |answers: &[String]| {
        assert_eq!(answers.len(), wanted.len());
        for (found, wanted) in answers.iter().zip(&wanted) {
            assert_near(&scores(found), &wanted["scores"], "scores");
        }
    };
    let found = infer(&server, name, &json!({"id": "7", "inputs": [input(json!(TEXTS))]}));
    assert_eq!((&found["id"], &found["model_name"]), (&json!("7"), &json!(name)), "{found}");
    let output = &found["outputs"][0];
    assert_eq!(
        (&output["name"], &output["datatype"], &output["shape"]),
        (&json!("answer"), &json!("BYTES"), &json!([5]))
    );
    held(&serde_json::from_value::<Vec<String>>(output["data"].clone()).unwrap());

    let behind: Vec<u8> =
        TEXTS.iter().flat_map(|t| [&(t.len() as u32).to_le_bytes(), t.as_bytes()].concat()).collect();
    let body = json!({"inputs": [without_data(&input(Value::Null), behind.len())],
                      "outputs": [{"name": "answer", "parameters": {"binary_data": true}}]});
    let (json, mut bytes) = infer_binary(&server, name, &body, &behind);
    assert_eq!(json["outputs"][0]["parameters"]["binary_data_size"], bytes.len());
    let mut answers = Vec::new();
    while !bytes.is_empty() {
        let length = u32::from_le_bytes(bytes[..4].try_into().unwrap()) as usize;
        let rest = bytes.split_off(4 + length);
        answers.push(String::from_utf8(bytes.split_off(4)).unwrap());
        bytes = rest;
    }
    held(&answers);

    // pairs are records of two fields
    let pair = json!({"name": "text_pair", "datatype": "BYTES", "shape": [TEXTS.len()], "data": vec!["sun"; TEXTS.len()]});
    let found = infer(&server, name, &json!({"inputs": [input(json!(TEXTS)), pair]}));
    let wanted = batch(&dir, &[json!({"text": TEXTS[0], "text_pair": "sun"})]);
    assert_near(&scores(found["outputs"][0]["data"][0].as_str().unwrap()), &wanted[0]["scores"], "a pair");
}

#[test]
fn texts_and_tensors_of_many_clients_are_each_given_their_own() {
    let (_guard, dir) = exported("tiny-bert-single");
    // one session that waits for others, so that batches hold records and rows of several requests
    let server =
        Server::start(&[&dir], &["--threads", "1", "--max-wait-us", "100000", "--max-batch-tokens", "4096"]);
    let name = "tiny-bert-single";
    let encodings = encodings(&dir);
    let text =
        |text: &str| json!({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}]});
    let tensor = |encoding: &Encoding| json!({"inputs": [{"name": "input_ids", "datatype": "INT64", "shape": [1, encoding.len()], "data": [encoding.ids]}]});
    let logits = |found: &Value| found["outputs"][0]["data"].clone();
    let of_text = |found: &Value| {
        serde_json::from_str::<Value>(found["outputs"][0]["data"][0].as_str().unwrap()).unwrap()["logits"]
            .clone()
    };
    let wanted: Vec<Value> =
        encodings.iter().map(|encoding| logits(&infer(&server, name, &tensor(encoding)))).collect();
    let (text, tensor, server, wanted) = (&text, &tensor, &server, &wanted);
    std::thread::scope(|scope| {
        for (i, encoding) in encodings.iter().enumerate() {
            scope.spawn(move || {
                assert_near(&logits(&infer(server, name, &tensor(encoding))), &wanted[i], "a row")
            });
            scope.spawn(move || {
                assert_near(&of_text(&infer(server, name, &text(TEXTS[i]))), &wanted[i], "a text")
            });
        }
    });
}

#[test]
fn what_does_not_fit_is_refused_by_name_and_the_next_request_is_answered() {
    let (_a, dir) = exported("tiny-bert-single");
    let (_b, speaker) = exported("tiny-gpt2-lm");
    let limits =
        ["--max-records", "3", "--max-request-tokens", "40", "--max-length", "32", "--max-body", "20000"];
    let server = Server::start(&[&dir, &speaker], &limits);
    let path = "/v2/models/tiny-bert-single/infer";
    let ids = |shape: Value, data: Value| json!({"name": "input_ids", "datatype": "INT64", "shape": shape, "data": data});
    let text = json!({"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]});
    let good = || ids(json!([1, 3]), json!([2, 5, 3]));
    let with = |name: &str, data: Value| json!({"inputs": [good(), {"name": name, "datatype": "INT64", "shape": [1, 3], "data": data}]});
    for (body, status, says) in [
        (json!({"inputs": []}), 400, "there is no text in it"),
        (json!({}), 422, "missing field `inputs`"),
        (json!({"inputs": [ids(json!([0, 3]), json!([]))]}), 400, "there is no row in it"),
        (
            json!({"inputs": [ids(json!([1, 2]), json!([2, 5, 3]))]}),
            422,
            "input_ids: data of the shape [3], expected [1, 2]",
        ),
        (
            json!({"inputs": [ids(json!([3]), json!([2, 5, 3]))]}),
            422,
            "expected integers of the shape [rows, tokens]",
        ),
        (
            json!({"inputs": [ids(json!([1, 1]), json!([4_000_000]))]}),
            422,
            "row 0: input_ids has 4000000, expected 0 to",
        ),
        (
            json!({"inputs": [ids(json!([1, 33]), json!(vec![2; 33]))]}),
            422,
            "row 0: 33 tokens, expected 1 to 32",
        ),
        (
            json!({"inputs": [ids(json!([4, 1]), json!(vec![2; 4]))]}),
            413,
            "4 rows in one request, and 3 are allowed",
        ),
        (json!({"inputs": [ids(json!([2, 21]), json!(vec![2; 42]))]}), 413, "more than 40 tokens"),
        (with("attention_mask", json!([1, 0, 1])), 422, "padding stands at the end"),
        (with("token_type_ids", json!([0, 0, 9])), 422, "token_type_ids has 9"),
        (
            with("position_ids", json!([0, 1, 2])),
            422,
            "takes no \"position_ids\", but input_ids, attention_mask",
        ),
        (with("input_ids", json!([2, 5, 3])), 422, "two inputs are named input_ids"),
        (json!({"inputs": [good(), text]}), 422, "takes no \"text\""),
        (
            json!({"inputs": [good()], "outputs": [{"name": "answer"}]}),
            422,
            "gives no \"answer\", but logits",
        ),
        (
            json!({"inputs": [text], "outputs": [{"name": "logits"}]}),
            422,
            "there is no output \"logits\" of texts",
        ),
        (
            json!({"inputs": [text], "outputs": [{"name": "answer", "parameters": {"classification": 2}}]}),
            422,
            "classification",
        ),
        (
            json!({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 5}}]}),
            422,
            "binary_data_size is 5, and 0 bytes are left",
        ),
        (
            json!({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [3], "data": ["a"]}]}),
            422,
            "expected [3]",
        ),
        (
            json!({"inputs": [{"name": "text", "datatype": "INT64", "shape": [1], "data": [1]}]}),
            422,
            "expected BYTES: a text",
        ),
        (
            json!({"inputs": [{"name": "words", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}),
            422,
            "takes no input \"words\", but text and text_pair; or its graph's own: input_ids, attention_mask",
        ),
    ] {
        let (found, error) = server.post(path, body.clone());
        assert_eq!(found, status, "{body}: {error}");
        assert!(error["error"].as_str().unwrap().contains(says), "{body}: {error}");
    }
    // lengths that lie
    let body = json!({"inputs": [text]}).to_string();
    for (length, says) in [
        ("-1", "expected the bytes of the JSON"),
        ("x", "expected the bytes"),
        ("1", "EOF"),
        ("18446744073709551615", "and the body has"),
        ("99999999999999999999", "expected the bytes"),
    ] {
        let (status, _, error) =
            server.request("POST", path, &format!("Inference-Header-Content-Length: {length}\r\n"), &body);
        assert!(status == 422 && error.contains(says), "{length}: {error}");
    }
    let length = format!("Inference-Header-Content-Length: {}\r\n", body.len());
    let (status, _, error) = server.request("POST", path, &length, &format!("{body}abc"));
    assert!(status == 422 && error.contains("3 bytes behind the last tensor"), "{error}");
    // a model that generates
    let (status, error) = server.post("/v2/models/tiny-gpt2-lm/infer", json!({"inputs": [good()]}));
    assert_eq!(status, 424, "{error}");
    assert!(error["error"].as_str().unwrap().contains("tiny-gpt2-lm generates texts"), "{error}");

    // a model has one version
    let of = |version: &str| format!("/v2/models/tiny-bert-single/versions/{version}");
    assert_eq!(server.get(&of("1")), server.get("/v2/models/tiny-bert-single"));
    assert_eq!(server.get(&format!("{}/ready", of("1"))).0, 200);
    assert_eq!(server.post(&format!("{}/infer", of("1")), json!({"inputs": [good()]})).0, 200);
    let (status, error) = server.post(&format!("{}/infer", of("2")), json!({"inputs": [good()]}));
    assert_eq!(status, 404, "{error}");
    assert!(error["error"].as_str().unwrap().contains("no model \"tiny-bert-single, version 2\""), "{error}");
    assert_eq!((server.get(&of("2")).0, server.get(&format!("{}/ready", of("x"))).0), (404, 404));

    let about = server.get("/v2").1;
    assert_eq!(about["extensions"], json!(["binary_tensor_data"]));
    infer(&server, "tiny-bert-single", &json!({"inputs": [good()]}));
    assert_eq!(server.stop(), Some(0));
}
