//! A `tk serve` that a test asks: every answer is held against the server's own document.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

use super::{copy_dir, models, tk};

/// A server that is killed when it is dropped.
pub struct Server {
    pub process: Child,
    pub address: String,
    /// What it says of its answers: every one that a test gets is held against it.
    document: OnceLock<Value>,
}

impl Server {
    /// Starts one on a free port and waits until it listens.
    pub fn start(dirs: &[&Path], args: &[&str]) -> Self {
        Self::start_loud(dirs, &[&["--quiet"], args].concat())
    }

    /// The same of one that may say something: [`Server::stop_for_log`] gives it.
    pub fn start_loud(dirs: &[&Path], args: &[&str]) -> Self {
        let mut process = Command::new(assert_cmd::cargo::cargo_bin!("tk"))
            .args(["serve", "--listen", "127.0.0.1:0", "--json"])
            .args(args)
            .args(dirs)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        if line.is_empty() {
            let mut said = String::new();
            process.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            panic!("the server did not start: {said}");
        }
        let about: Value = serde_json::from_str(&line).unwrap();
        let address = about["address"].as_str().unwrap().to_owned();
        Self { process, address, document: OnceLock::new() }
    }

    /// Sends bytes on a connection of their own and reads until it is closed: the status, the head and the body.
    pub fn send(&self, request: &[u8]) -> (u16, String, String) {
        let (status, head, body) = self.send_for_bytes(request);
        (status, head, String::from_utf8(body).unwrap())
    }

    /// The same where the body may be no text.
    pub fn send_for_bytes(&self, request: &[u8]) -> (u16, String, Vec<u8>) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        // a server that refuses a body may close before it is read
        let _ = stream.write_all(request);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or(answer.len());
        let body = answer.get(end + 4..).unwrap_or_default().to_vec();
        let head = String::from_utf8(answer[..end].to_vec()).unwrap();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
        (status, head, body)
    }

    pub fn ask(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String, String) {
        let length = body.len();
        self.send(
            format!(
                "{method} {path} HTTP/1.1\r\nHost: tk\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
            )
            .as_bytes(),
        )
    }

    pub fn request(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String, String) {
        let answer = self.ask(method, path, headers, body);
        self.assert_documented(method, path, &answer);
        answer
    }

    pub fn document(&self) -> &Value {
        self.document.get_or_init(|| {
            let (status, head, body) = self.ask("GET", "/openapi.json", "", "");
            assert!(status == 200 && head.contains("content-type: application/json"), "{head}");
            serde_json::from_str(&body).unwrap()
        })
    }

    /// Holds an answer against the document: its status, its type, its body and its headers.
    pub fn assert_documented(&self, method: &str, path: &str, (status, head, body): &(u16, String, String)) {
        let document = self.document();
        let fits = |template: &str| {
            let (template, path): (Vec<_>, Vec<_>) =
                (template.split('/').collect(), path.split('/').collect());
            template.len() == path.len()
                && template.iter().zip(path).all(|(a, b)| *a == b || a.starts_with('{'))
        };
        let found = document["paths"].as_object().unwrap().iter().find(|(template, _)| fits(template));
        let Some(operation) = found.and_then(|(_, item)| item.get(method.to_lowercase())) else {
            assert!([404, 405].contains(status), "{method} {path} is not in the document: {status}");
            return;
        };
        let response = &operation["responses"][status.to_string()];
        assert!(response.is_object(), "{method} {path}: {status} is not in the document: {body}");
        let head: Vec<(String, &str)> = (head.lines().filter_map(|line| line.split_once(": ")))
            .map(|(name, value)| (name.to_lowercase(), value))
            .collect();
        for (name, _) in response["headers"].as_object().into_iter().flatten() {
            assert!(head.iter().any(|(found, _)| found == name), "{method} {path}: {status} without {name}");
        }
        let ours = |name: &str| name.starts_with("x-") || ["retry-after", "www-authenticate"].contains(&name);
        for (name, _) in head.iter().filter(|(name, _)| ours(name)) {
            assert!(response["headers"][name].is_object(), "{method} {path}: {status} with {name}");
        }
        let form = head.iter().find(|(name, _)| name == "content-type").map_or("", |(_, form)| form);
        let schema = &response["content"][form]["schema"];
        assert!(schema.is_object(), "{method} {path}: {status} of type {form:?} is not in the document");
        if form == "application/json" {
            let value: Value = serde_json::from_str(body).unwrap();
            if let Err(error) = super::schema::check(document, schema, &value, "body") {
                panic!("{method} {path}: {status}: {error}");
            }
        }
    }

    pub fn get(&self, path: &str) -> (u16, Value) {
        let (status, _, body) = self.request("GET", path, "", "");
        (status, serde_json::from_str(&body).unwrap_or(Value::String(body)))
    }

    pub fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let (status, _, answer) = self.request("POST", path, "", &body.to_string());
        (status, serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e}: {answer}")))
    }

    /// Asks it to end, and waits; what it has written on stderr since its start.
    pub fn stop_for_log(mut self) -> String {
        let mut stderr = self.process.stderr.take().unwrap();
        assert_eq!(self.stop(), Some(0));
        let mut log = String::new();
        stderr.read_to_string(&mut log).unwrap();
        log
    }

    /// Asks it to end, and waits; the exit code.
    pub fn stop(mut self) -> Option<i32> {
        // SAFETY: a signal to a child that was not waited for yet, so its number is its own.
        let sent = unsafe { libc::kill(self.process.id() as i32, libc::SIGTERM) };
        assert_eq!(sent, 0);
        self.process.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A copy of a tiny model, exported.
pub fn exported(model: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(model);
    copy_dir(&models(model), &path);
    tk().args(["export", "--quiet"]).arg(&path).assert().success();
    (dir, path)
}

/// What `tk serve-batch` answers to records, without the index.
pub fn batch(dir: &Path, records: &[Value]) -> Vec<Value> {
    let input: String = records.iter().map(|record| format!("{record}\n")).collect();
    let out = tk().arg("serve-batch").arg(dir).args(["--input", "-"]).write_stdin(input).assert().success();
    let text = String::from_utf8(out.get_output().stdout.clone()).unwrap();
    let answer = |line: &str| {
        let mut answer: Value = serde_json::from_str(line).unwrap();
        answer.as_object_mut().unwrap().shift_remove("index");
        answer
    };
    text.lines().map(answer).collect()
}

pub const TEXTS: [&str; 5] = [
    "I love this film",
    "naïve café in Ångström, 東京 and 😀",
    "a",
    "rain in the morning, sun at night",
    "!?",
];

/// Numbers that are equal up to what another batch rounds.
pub fn assert_near(found: &Value, wanted: &Value, place: &str) {
    match (found, wanted) {
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap(), b.as_f64().unwrap());
            assert!((a - b).abs() < 1e-6, "{place}: {a} and {b}");
        }
        (Value::Array(a), Value::Array(b)) => {
            assert_eq!(a.len(), b.len(), "{place}: {found} and {wanted}");
            a.iter().zip(b).enumerate().for_each(|(i, (a, b))| assert_near(a, b, &format!("{place}[{i}]")));
        }
        (Value::Object(a), Value::Object(b)) => {
            assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>(), "{place}");
            a.iter().for_each(|(key, a)| assert_near(a, &b[key], &format!("{place}.{key}")));
        }
        _ => assert_eq!(found, wanted, "{place}"),
    }
}

/// Sets a parameter of a model's weights to one number.
pub fn overwrite(dir: &Path, parameter: &str, number: f32) {
    super::change_weights(dir, |name| name == parameter, |_| number);
}
