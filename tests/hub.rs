//! Models from a hub: a server on this machine speaks the hub's protocol as hf-hub uses it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use tk::data::hub::{HubOptions, model_dir_with};
use tk::data::tokens::Tokenizer;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server serves and has seen.
#[derive(Default)]
struct Shelf {
    /// By path under the repository `owner/tiny`.
    files: BTreeMap<String, Vec<u8>>,
    commit: String,
    /// The commit from the first request for a tokenizer on.
    moves_to: Option<String>,
    /// Required, where there is one.
    token: Option<String>,
    /// How many bytes of a response are sent before the connection breaks, once.
    breaks_after: Option<usize>,
    requests: Vec<String>,
}

/// A hub that lives as long as the process. Each connection carries one request.
struct Hub {
    endpoint: String,
    shelf: Arc<Mutex<Shelf>>,
}

impl Hub {
    fn start(files: impl IntoIterator<Item = (&'static str, Vec<u8>)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let files = files.into_iter().map(|(name, bytes)| (name.to_owned(), bytes)).collect();
        let shelf = Arc::new(Mutex::new(Shelf { files, commit: COMMIT.into(), ..Shelf::default() }));
        let served = Arc::clone(&shelf);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // a client that goes away is not this server's matter
                let _ = serve(stream.unwrap(), &mut served.lock().unwrap());
            }
        });
        Self { endpoint, shelf }
    }

    /// The files of a reference model.
    fn of_tiny_bert() -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tiny-bert-single");
        let names = [
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
        ];
        Self::start(names.map(|name| (name, std::fs::read(dir.join(name)).unwrap())))
    }

    fn options(&self, cache: &Path) -> HubOptions {
        HubOptions {
            endpoint: self.endpoint.clone(),
            cache: cache.into(),
            token: None,
            offline: false,
            quiet: true,
        }
    }

    fn shelf(&self) -> std::sync::MutexGuard<'_, Shelf> {
        self.shelf.lock().unwrap()
    }
}

/// Answers as huggingface.co does: small files at once, weights by way of a redirect to a store.
fn serve(stream: TcpStream, shelf: &mut Shelf) -> std::io::Result<()> {
    let (mut path, mut range, mut token) = (String::new(), None, None);
    for (i, line) in BufReader::new(&stream).lines().enumerate() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        match line.split_once(": ") {
            None if i == 0 => path = line.split(' ').nth(1).unwrap_or_default().to_owned(),
            Some((name, value)) if name.eq_ignore_ascii_case("range") => range = Some(value.to_owned()),
            Some((name, value)) if name.eq_ignore_ascii_case("authorization") => {
                token = Some(value.to_owned())
            }
            _ => {}
        }
    }
    shelf.requests.push(path.clone());
    if path.contains("tokenizer") {
        shelf.commit = shelf.moves_to.take().unwrap_or_else(|| shelf.commit.clone());
    }
    let mut stream = stream;
    let mut answer = |status: &str, headers: &str, body: &[u8]| {
        write!(
            stream,
            "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        )?;
        stream.write_all(body)
    };
    let required = shelf.token.as_ref().map(|token| format!("Bearer {token}"));
    if required.is_some() && token != required {
        return answer("401 Unauthorized", "", b"");
    }
    let name = ["main", "v1.0", "refs%2Fpr%2F1"]
        .iter()
        .find_map(|revision| path.strip_prefix(&format!("/owner/tiny/resolve/{revision}/")))
        .or_else(|| path.strip_prefix("/store/"));
    let Some((name, bytes)) = name.and_then(|name| shelf.files.get_key_value(name)) else {
        return answer("404 Not Found", "X-Error-Code: EntryNotFound\r\n", b"Entry not found");
    };
    let etag = format!("\"etag-of-{name}-{}\"", bytes.len());
    let commit = format!("X-Repo-Commit: {}\r\n", shelf.commit);
    if name.ends_with(".safetensors") && !path.starts_with("/store/") {
        let headers =
            format!("{commit}X-Linked-Etag: {etag}\r\nETag: \"pointer\"\r\nLocation: /store/{name}\r\n");
        return answer("302 Found", &headers, b"");
    }
    let last = bytes.len() - 1;
    let (from, to) =
        range.as_ref().and_then(|range| range.strip_prefix("bytes=")?.split_once('-')).unwrap_or_default();
    let (from, to) = (from.parse().unwrap_or(0), to.parse().unwrap_or(last).min(last));
    let headers = format!("{commit}ETag: {etag}\r\nContent-Range: bytes {from}-{to}/{}\r\n", bytes.len());
    let body = &bytes[from..=to];
    match shelf.breaks_after.filter(|sent| *sent < body.len()) {
        Some(sent) => {
            shelf.breaks_after = None;
            write!(
                stream,
                "HTTP/1.1 206 Partial Content\r\n{headers}Content-Length: {}\r\n\r\n",
                body.len()
            )?;
            stream.write_all(&body[..sent])
        }
        None => answer("206 Partial Content", &headers, body),
    }
}

/// The message of an error that is the caller's to mend.
fn refused(model: &str, options: &HubOptions) -> String {
    let error = model_dir_with(model, options).unwrap_err();
    assert_eq!(tk::error::exit_code(&error), 2, "{error:#}");
    format!("{error:#}")
}

#[test]
fn a_model_is_fetched_once_and_then_read_from_the_cache() {
    let hub = Hub::of_tiny_bert();
    let cache = tempfile::tempdir().unwrap();
    let mut options = hub.options(cache.path());
    let dir = model_dir_with("owner/tiny", &options).unwrap();
    assert_eq!(dir, cache.path().join("models--owner--tiny/snapshots").join(COMMIT));
    for (name, bytes) in &hub.shelf().files {
        assert_eq!(&std::fs::read(dir.join(name)).unwrap(), bytes, "{name}");
    }
    Tokenizer::open(&dir).unwrap();

    let asked = hub.shelf().requests.len();
    assert_eq!(model_dir_with("owner/tiny", &options).unwrap(), dir);
    assert_eq!(hub.shelf().requests.len(), asked);
    options.offline = true;
    options.endpoint = "http://127.0.0.1:9".into();
    assert_eq!(model_dir_with("owner/tiny", &options).unwrap(), dir);
    assert_eq!(model_dir_with(&format!("owner/tiny@{COMMIT}"), &options).unwrap(), dir);
}

#[test]
fn a_directory_is_itself_even_where_it_could_be_an_id() {
    let hub = Hub::start([]);
    let cache = tempfile::tempdir().unwrap();
    assert_eq!(
        model_dir_with("models/tiny-bert-single", &hub.options(cache.path())).unwrap(),
        Path::new("models/tiny-bert-single")
    );
    assert_eq!(hub.shelf().requests.len(), 0);
}

#[test]
fn sharded_weights_and_vocab_txt_are_fetched() {
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let hub = Hub::start([
        ("config.json", b"{}".to_vec()),
        ("vocab.txt", b"[UNK]".to_vec()),
        ("model.safetensors.index.json", index.to_vec()),
        ("model-1.safetensors", b"one".to_vec()),
        ("model-2.safetensors", b"two!".to_vec()),
    ]);
    let cache = tempfile::tempdir().unwrap();
    let options = hub.options(cache.path());
    let dir = model_dir_with("owner/tiny", &options).unwrap();
    assert_eq!(std::fs::read(dir.join("model-2.safetensors")).unwrap(), b"two!");

    // a shard that is gone makes the cache incomplete, and only it is fetched again
    std::fs::remove_file(dir.join("model-2.safetensors")).unwrap();
    hub.shelf().requests.clear();
    assert_eq!(model_dir_with("owner/tiny", &options).unwrap(), dir);
    assert!(dir.join("model-2.safetensors").is_file());
    assert!(!hub.shelf().requests.iter().any(|path| path.ends_with("model-1.safetensors")));

    let outside = br#"{"weight_map": {"a": "../../evil"}}"#.to_vec();
    hub.shelf().files.insert("model.safetensors.index.json".into(), outside);
    hub.shelf().commit = "f".repeat(40);
    let message = refused("owner/tiny@v1.0", &options);
    assert!(message.contains(r#""../../evil" is not the name of a file beside it"#), "{message}");
}

#[test]
fn a_model_that_is_not_there_is_named_with_what_was_tried() {
    let hub = Hub::of_tiny_bert();
    let cache = tempfile::tempdir().unwrap();
    let mut options = hub.options(cache.path());
    for model in ["owner/none", "none", "owner/tiny@v9"] {
        let message = refused(model, &options);
        let tried =
            format!("{model:?} is neither a directory nor found on the hub: there is no {}/", hub.endpoint);
        assert!(message.starts_with(&tried), "{message}");
    }
    hub.shelf().files.remove("model.safetensors");
    let message = refused("owner/tiny", &options);
    assert!(message.starts_with("owner/tiny has no model.safetensors at http://127.0.0.1:"), "{message}");

    options.endpoint = "http://127.0.0.1:9".into();
    let message = refused("owner/other", &options);
    assert!(
        message.contains("the hub could not be asked for http://127.0.0.1:9/owner/other/resolve/main/"),
        "{message}"
    );
}

#[test]
fn paths_are_never_asked_of_the_hub() {
    let hub = Hub::start([]);
    let cache = tempfile::tempdir().unwrap();
    let options = hub.options(cache.path());
    for model in
        ["./none", "/none/x", "../none", "a/b/c", "a/", "", "a b", "~/x", r"a\b", "a@", "a/b@../../x"]
    {
        let message = refused(model, &options);
        assert!(message.starts_with("no such directory: "), "{message}");
    }
    assert!(refused("Cargo.toml", &options).starts_with("Cargo.toml is a file; "));
    assert_eq!(hub.shelf().requests.len(), 0);
}

#[test]
fn offline_only_the_cache_is_used() {
    let hub = Hub::of_tiny_bert();
    let cache = tempfile::tempdir().unwrap();
    let options = HubOptions { offline: true, ..hub.options(cache.path()) };
    let message = refused("owner/tiny", &options);
    assert!(message.contains("models--owner--tiny, and HF_HUB_OFFLINE forbids asking the hub"), "{message}");
    assert_eq!(hub.shelf().requests.len(), 0);
}

#[test]
fn the_token_is_sent() {
    let hub = Hub::of_tiny_bert();
    hub.shelf().token = Some("hf_secret".into());
    let cache = tempfile::tempdir().unwrap();
    let mut options = hub.options(cache.path());
    let message = refused("owner/tiny", &options);
    assert!(message.contains("http status: 401") && message.ends_with("HF_TOKEN is not set"), "{message}");
    options.token = Some("hf_secret".into());
    model_dir_with("owner/tiny", &options).unwrap();
}

#[test]
fn revisions_stand_side_by_side() {
    let hub = Hub::of_tiny_bert();
    let cache = tempfile::tempdir().unwrap();
    let options = hub.options(cache.path());
    let main = model_dir_with("owner/tiny", &options).unwrap();
    hub.shelf().commit = "f".repeat(40);
    hub.shelf().files.insert("config.json".into(), b"{\"new\": true}".to_vec());
    let other = model_dir_with("owner/tiny@refs/pr/1", &options).unwrap();
    assert_eq!(other, cache.path().join("models--owner--tiny/snapshots").join("f".repeat(40)));
    assert_eq!(std::fs::read(other.join("config.json")).unwrap(), b"{\"new\": true}");
    assert_eq!(model_dir_with("owner/tiny@main", &options).unwrap(), main);
    assert_ne!(std::fs::read(main.join("config.json")).unwrap(), b"{\"new\": true}");
}

#[test]
fn files_of_two_commits_are_not_mixed() {
    let hub = Hub::of_tiny_bert();
    hub.shelf().moves_to = Some("f".repeat(40));
    let cache = tempfile::tempdir().unwrap();
    let options = hub.options(cache.path());
    let error = model_dir_with("owner/tiny", &options).unwrap_err();
    assert_eq!(error.to_string(), "owner/tiny was changed on the hub while it was fetched: try again");
    let dir = model_dir_with("owner/tiny", &options).unwrap();
    assert!(dir.ends_with("f".repeat(40)) && dir.join("config.json").is_file());
}

#[test]
fn a_download_that_breaks_off_goes_on_where_it_stopped() {
    let hub = Hub::of_tiny_bert();
    let weights = hub.shelf().files["model.safetensors"].clone();
    hub.shelf().breaks_after = Some(100_000);
    let cache = tempfile::tempdir().unwrap();
    let dir = model_dir_with("owner/tiny", &hub.options(cache.path())).unwrap();
    assert!(hub.shelf().breaks_after.is_none());
    assert!(std::fs::read(dir.join("model.safetensors")).unwrap() == weights);
}

#[test]
fn the_environment_is_read_as_huggingface_hub_reads_it() {
    let options = |variables: &[(&str, &str)]| {
        HubOptions::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into())
        })
    };
    let plain = options(&[("HOME", "/h"), ("HF_HUB_OFFLINE", "0"), ("HF_TOKEN", "")]).unwrap();
    assert_eq!(plain.cache, Path::new("/h/.cache/huggingface/hub"));
    assert_eq!(
        (plain.endpoint.as_str(), plain.token, plain.offline),
        ("https://huggingface.co", None, false)
    );
    let home = tempfile::tempdir().unwrap();
    std::fs::write(home.path().join("token"), "hf_stored\n").unwrap();
    let home = home.path().to_str().unwrap();
    let set =
        options(&[("HOME", "/h"), ("HF_HOME", home), ("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://x/")])
            .unwrap();
    assert_eq!(set.cache, Path::new(home).join("hub"));
    assert_eq!(
        (set.endpoint.as_str(), set.token.as_deref(), set.offline),
        ("http://x", Some("hf_stored"), true)
    );
    let set = options(&[("HF_HOME", home), ("HF_TOKEN", " hf_t\n"), ("HF_HUB_CACHE", "/c")]).unwrap();
    assert_eq!((set.token.as_deref(), set.cache.as_path()), (Some("hf_t"), Path::new("/c")));
    assert!(options(&[]).is_err_and(|error| error.to_string().contains("HF_HOME")));
}
