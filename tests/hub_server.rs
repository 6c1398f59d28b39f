//! A Hub on the loopback: the real routes over files in memory, with injectable faults.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use crate::hub_bytes::{base64, commit, git_oid, sha256};

/// A fault of the next `times` requests whose path contains `path`.
#[derive(Clone)]
pub(crate) struct Fault {
    pub path: &'static str,
    pub times: usize,
    pub what: Wrong,
}

#[derive(Clone, Copy)]
pub(crate) enum Wrong {
    /// Answers with this status and this `X-Error-Code`.
    Status(u16, &'static str),
    /// Breaks the connection after this many bytes of the body.
    Cut(usize),
    /// Sends this many bytes too many, with a matching length.
    Longer(usize),
    /// Changes a byte of the body.
    Flipped,
    /// Ignores the range.
    Whole,
    /// Ends the file after this many bytes, with a matching length.
    Short(usize),
    /// Delays the answer for a while, until another request has arrived.
    Together,
    /// Adds this header to the answer.
    Header(&'static str, &'static str),
    /// Stops sending after this many bytes of the body, but keeps the connection.
    Stall(usize),
    /// Sends nothing, not even a status, but keeps the connection.
    Mute,
}

/// Runs until dropped. Large files are at a second address, as on the Hub.
pub(crate) struct HubServer {
    ports: Ports,
    state: Arc<Mutex<State>>,
}

#[derive(Clone, Copy)]
struct Ports {
    hub: u16,
    cdn: u16,
}

#[derive(Default)]
struct State {
    /// Repositories by kind, name and revision.
    repos: BTreeMap<(String, String), BTreeMap<String, Files>>,
    faults: Vec<Fault>,
    log: Vec<String>,
    /// New names by old ones.
    renamed: BTreeMap<String, String>,
    /// Current and maximum number of concurrent requests.
    now: usize,
    most: usize,
    down: bool,
}

type Files = BTreeMap<String, Vec<u8>>;

/// Files of at least this size are behind a pointer and a redirect, like large ones.
const LARGE: usize = 20_000;

impl HubServer {
    pub(crate) fn start() -> HubServer {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [hub, cdn] = [0, 1].map(|i: usize| listeners[i].local_addr().unwrap().port());
        let ports = Ports { hub, cdn };
        let state = Arc::new(Mutex::new(State::default()));
        for listener in listeners {
            let shared = state.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    if shared.lock().unwrap().down {
                        break;
                    }
                    let shared = shared.clone();
                    thread::spawn(move || {
                        let request = parse(&stream)?;
                        let mut state = shared.lock().unwrap();
                        state.now += 1;
                        state.most = state.most.max(state.now);
                        drop(state);
                        answer(stream, request, ports, &shared)
                    });
                }
            });
        }
        HubServer { ports, state }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports.hub)
    }

    /// Redirects requests for the old name to the new one.
    pub(crate) fn rename(&self, old: &str, new: &str) {
        let mut state = self.state.lock().unwrap();
        state.renamed.insert(old.into(), new.into());
    }

    /// Returns the maximum number of concurrent requests.
    pub(crate) fn most_at_once(&self) -> usize {
        self.state.lock().unwrap().most
    }

    /// Adds a file to `models` or `datasets`, at a revision.
    pub(crate) fn put(&self, kind: &str, repo: &str, revision: &str, path: &str, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap();
        let repo = state.repos.entry((kind.into(), repo.into())).or_default();
        let files = repo.entry(revision.into()).or_default();
        files.insert(path.into(), bytes.into());
    }

    /// Returns the files of a revision.
    pub(crate) fn files(&self, kind: &str, repo: &str, revision: &str) -> Option<Files> {
        let state = self.state.lock().unwrap();
        let repo = state.repos.get(&(kind.into(), repo.into()))?;
        repo.get(revision).cloned()
    }

    pub(crate) fn fail(&self, path: &'static str, times: usize, what: Wrong) {
        let fault = Fault { path, times, what };
        self.state.lock().unwrap().faults.push(fault);
    }

    pub(crate) fn heal(&self) {
        self.state.lock().unwrap().faults.clear();
    }

    /// Returns every request since the last call: method, path, range and credentials.
    pub(crate) fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }
}

impl Drop for HubServer {
    fn drop(&mut self) {
        self.state.lock().unwrap().down = true;
        // Wakes the listeners, which then stop.
        for port in [self.ports.hub, self.ports.cdn] {
            let _ = TcpStream::connect(("127.0.0.1", port));
        }
    }
}

struct Request {
    method: String,
    path: String,
    query: String,
    headers: BTreeMap<String, String>,
    body: Vec<u8>,
}

#[derive(Default)]
struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

impl Reply {
    fn json(value: Value) -> Reply {
        Reply {
            status: 200,
            headers: vec![("Content-Type", "application/json".into())],
            body: value.to_string().into_bytes(),
        }
    }

    fn refuse(status: u16, code: &str) -> Reply {
        let mut reply = Reply::json(json!({"error": "refused"}));
        reply.status = status;
        reply.headers.push(("X-Error-Code", code.into()));
        reply
    }
}

fn answer(stream: TcpStream, request: Request, ports: Ports, shared: &Mutex<State>) -> Option<()> {
    let mut state = shared.lock().unwrap();
    let header = |name: &str| request.headers.get(name).map_or("", String::as_str);
    state.log.push(format!(
        "{} {} {} {}",
        request.method,
        request.path,
        header("range"),
        header("authorization")
    ));
    let fault = state.faults.iter_mut().find(|fault| {
        let any = matches!(
            fault.what,
            Wrong::Status(..) | Wrong::Mute | Wrong::Header(..)
        );
        fault.times > 0 && request.path.contains(fault.path) && (any || request.method != "HEAD")
    });
    let wrong = fault.map(|fault| {
        fault.times -= 1;
        fault.what
    });
    let mut reply = match wrong {
        Some(Wrong::Status(status, code)) => Reply::refuse(status, code),
        _ => route(&mut state, ports, &request),
    };
    drop(state);
    match wrong {
        Some(Wrong::Short(n)) => reply.body.truncate(n),
        Some(Wrong::Header(name, value)) => reply.headers.push((name, value.into())),
        Some(Wrong::Together) => wait_until(shared, 250, |state| state.now > 1),
        _ => {}
    }
    if reply.status == 200 && !matches!(wrong, Some(Wrong::Whole)) {
        heed_range(&mut reply, header("range"));
    }
    let mut sent = reply.body.len();
    match wrong {
        Some(Wrong::Mute) => {
            wait_until(shared, usize::MAX, |state| state.down);
            return None;
        }
        Some(Wrong::Cut(n) | Wrong::Stall(n)) => sent = n.min(sent),
        Some(Wrong::Longer(n)) => {
            reply.body.extend(vec![0; n]);
            sent += n;
        }
        Some(Wrong::Flipped) => *reply.body.last_mut()? ^= 1,
        _ => {}
    }
    let mut head = format!(
        "HTTP/1.1 {} X\r\nContent-Length: {}\r\nConnection: close\r\n",
        reply.status,
        reply.body.len()
    );
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    // Recorded before the answer, so that the order of sequential requests is certain.
    shared.lock().unwrap().now -= 1;
    let mut stream = &stream;
    stream.write_all((head + "\r\n").as_bytes()).ok()?;
    if request.method != "HEAD" {
        stream.write_all(&reply.body[..sent]).ok()?;
    }
    if matches!(wrong, Some(Wrong::Stall(_))) {
        wait_until(shared, usize::MAX, |state| state.down);
    }
    Some(())
}

/// Holds a connection open, for at most `most` times 20 ms.
fn wait_until(shared: &Mutex<State>, most: usize, done: impl Fn(&State) -> bool) {
    for _ in 0..most {
        if done(&shared.lock().unwrap()) {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn parse(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) => headers.insert(name.to_lowercase(), value.to_owned()),
            None => break,
        };
    }
    let length = headers.get("content-length");
    let mut body = vec![0; length.map_or(0, |n| n.parse().unwrap())];
    reader.read_exact(&mut body).ok()?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    Some(Request {
        method,
        path: path.replace("%2F", "/"),
        query: query.to_owned(),
        headers,
        body,
    })
}

fn heed_range(reply: &mut Reply, range: &str) {
    if let Some((start, end)) = range
        .strip_prefix("bytes=")
        .and_then(|range| range.split_once('-'))
    {
        let start: usize = start.parse().unwrap();
        let end = end.parse().map_or(reply.body.len(), |end: usize| end + 1);
        if start >= reply.body.len() {
            *reply = Reply::refuse(416, "");
            return;
        }
        reply.status = 206;
        reply.body = reply.body[start..end.min(reply.body.len())].to_vec();
    }
}

fn route(state: &mut State, ports: Ports, request: &Request) -> Reply {
    let path = request.path.trim_start_matches('/');
    if let Some(hash) = path.strip_prefix("cdn/") {
        let files = state.repos.values().flat_map(BTreeMap::values).flatten();
        let found = files.into_iter().find(|(_, bytes)| sha256(bytes) == hash);
        return found.map_or(Reply::refuse(404, ""), |(_, bytes)| Reply {
            status: 200,
            body: bytes.clone(),
            ..Reply::default()
        });
    }
    if path == "api/repos/create" {
        let body: Value = serde_json::from_slice(&request.body).unwrap();
        let text = |key: &str| body[key].as_str().unwrap_or_default().to_owned();
        let name = format!("{}/{}", text("organization"), text("name"));
        let key = ("models".to_owned(), name.clone());
        if state.repos.contains_key(&key) {
            return Reply::refuse(409, "");
        }
        let empty = BTreeMap::from([("main".to_owned(), Files::new())]);
        state.repos.insert(key, empty);
        return Reply::json(json!({"url": format!("http://127.0.0.1/{name}")}));
    }
    let (api, path) = match path.strip_prefix("api/") {
        Some(path) => (true, path),
        None => (false, path),
    };
    let (kind, path) = match path.split_once('/') {
        Some((kind @ ("models" | "datasets"), path)) => (kind, path),
        _ => ("models", path),
    };
    let mut parts = path.splitn(4, '/');
    let mut part = || parts.next().unwrap_or_default().to_owned();
    let (repo, action, rest) = (format!("{}/{}", part(), part()), part(), part());
    if let Some(new) = state.renamed.get(&repo) {
        // A path without a host, as on the Hub.
        let place = format!("{}?{}", request.path.replace(&repo, new), request.query);
        return Reply {
            status: 307,
            headers: vec![("Location", place)],
            body: Vec::new(),
        };
    }
    let Some(revisions) = state.repos.get_mut(&(kind.to_owned(), repo.clone())) else {
        return Reply::refuse(404, "RepoNotFound");
    };
    if action == "branch" {
        let start = revisions.get("main").cloned().unwrap_or_default();
        revisions.insert(rest, start);
        return Reply::json(json!({}));
    }
    // A revision may contain slashes; a commit stands for its revision.
    let revision = revisions.keys().find(|revision| {
        let starts = |name: &str| rest == name || rest.starts_with(&format!("{name}/"));
        starts(revision) || starts(&commit(&repo, revision))
    });
    let Some(revision) = revision.cloned() else {
        return Reply::refuse(404, "RevisionNotFound");
    };
    let commit = commit(&repo, &revision);
    let named = match rest.starts_with(&commit) {
        true => commit.len(),
        false => revision.len(),
    };
    let file = rest[named..].trim_start_matches('/').to_owned();
    let files = revisions.get_mut(&revision).expect("it was found");
    match (api, action.as_str()) {
        (true, "revision") => Reply::json(json!({"id": repo, "sha": commit})),
        (true, "tree") => tree(files, ports.hub, request),
        (true, "preupload") => {
            let body: Value = serde_json::from_slice(&request.body).unwrap();
            let entries = body["files"].as_array().unwrap().iter();
            let entries = entries.map(|f| json!({"path": f["path"], "uploadMode": "regular"}));
            Reply::json(json!({"files": entries.collect::<Vec<_>>()}))
        }
        (true, "commit") => {
            upload(files, &request.body);
            Reply::json(json!({"commitOid": commit, "commitUrl": "http://127.0.0.1/"}))
        }
        (false, "resolve") => match files.get(&file) {
            Some(bytes) => resolve(bytes, ports.cdn, &commit),
            None => Reply::refuse(404, "EntryNotFound"),
        },
        _ => Reply::refuse(404, ""),
    }
}

/// Returns two entries per page, so that clients must follow the link to the next.
fn tree(files: &Files, port: u16, request: &Request) -> Reply {
    let page: usize = request
        .query
        .split("page=")
        .nth(1)
        .map_or(0, |n| n.parse().unwrap());
    let entries = files.iter().map(|(path, bytes)| {
        let large = bytes.len() >= LARGE;
        let pointer = format!(
            "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n",
            sha256(bytes),
            bytes.len()
        );
        let oid = match large {
            true => git_oid(pointer.as_bytes()),
            false => git_oid(bytes),
        };
        let mut entry = json!({"type": "file", "path": path, "size": bytes.len(), "oid": oid});
        if large {
            let size = bytes.len();
            entry["lfs"] =
                json!({"oid": sha256(bytes), "size": size, "pointerSize": pointer.len()});
        }
        entry
    });
    let entries: Vec<Value> = entries.skip(2 * page).take(2).collect();
    let mut reply = Reply::json(Value::Array(entries));
    if files.len() > 2 * (page + 1) {
        let next = format!(
            "<http://127.0.0.1:{port}{}?recursive=true&page={}>; rel=\"next\"",
            request.path,
            page + 1
        );
        reply.headers.push(("Link", next));
    }
    reply
}

fn resolve(bytes: &[u8], port: u16, commit: &str) -> Reply {
    let commit = ("X-Repo-Commit", commit.to_owned());
    if bytes.len() < LARGE {
        return Reply {
            status: 200,
            headers: vec![commit, ("ETag", format!("\"{}\"", git_oid(bytes)))],
            body: bytes.to_vec(),
        };
    }
    let hash = sha256(bytes);
    Reply {
        status: 302,
        headers: vec![
            commit,
            ("X-Linked-Etag", format!("\"{hash}\"")),
            ("X-Linked-Size", bytes.len().to_string()),
            ("Location", format!("http://127.0.0.1:{port}/cdn/{hash}")),
        ],
        body: Vec::new(),
    }
}

/// Applies a commit's lines of JSON, with files inline as base64.
fn upload(files: &mut Files, body: &[u8]) {
    for line in body.split(|&b| b == b'\n').filter(|line| !line.is_empty()) {
        let line: Value = serde_json::from_slice(line).unwrap();
        let value = &line["value"];
        let path = || value["path"].as_str().unwrap().to_owned();
        match line["key"].as_str() {
            Some("file") => {
                files.insert(path(), base64(value["content"].as_str().unwrap()));
            }
            Some("deletedFile") => {
                files.remove(&path());
            }
            _ => {}
        }
    }
}

/// Runs `command` against the Hub at `url`; checks that its output never contains the token.
pub(crate) fn silent(command: &mut Command, url: &str, token: &str) -> Output {
    let output = command
        .env("HF_ENDPOINT", url)
        .env("HF_TOKEN", token)
        .output()
        .unwrap();
    for text in [&output.stdout, &output.stderr] {
        let text = String::from_utf8_lossy(text);
        assert!(!text.contains(token), "the token is told: {text}");
    }
    output
}
