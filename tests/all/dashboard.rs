//! The dashboard in a browser: headless Chromium, driven by the DevTools protocol.
//!
//! Without Chromium these tests print a message and are skipped.

use std::fs::{OpenOptions, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

use crate::harness::{Client, PATIENCE, Server, guest, request};

const TOKEN: &str = "a+token/that=nobody%20guesses";

/// The token in the fragment of a URL. A plus sign is literal there.
const TOKEN_IN_URL: &str = "a+token/that=nobody%2520guesses";

/// The visible rows of open connections.
const ROWS: &str = "[...document.querySelectorAll('#connections tbody tr:not(.ended)')]";

/// The version of the guest for new connections.
const CURRENT: &str = "document.querySelector('#services tr.current th')?.textContent";

/// The result of the last action.
const NOTICE: &str = "document.querySelector('#notice-text').textContent";

/// The state of the server, if it is not serving.
const PROBLEM: &str = "document.querySelector('#problem').textContent";

#[test]
fn dashboard_shows_and_kills_a_connection_by_keyboard() {
    let Some(mut page) = Page::new() else { return };
    let deployment = Deployment::start(&[]);
    page.open(&deployment.with_token());
    let mut client = deployment.server.connect();
    client.send("hello");
    assert_eq!(client.read(5), "hello");
    let peer = client.0.local_addr().unwrap();
    page.wait_for(&format!(
        "{ROWS}.some(row => row.innerText.includes('{peer}') && row.innerText.match(/5 B\\s+5 B/))"
    ));

    // The focus stays on its row while other rows appear and disappear.
    page.run(&format!("{ROWS}[0].querySelector('button').focus()"));
    let mut others: Vec<Client> = (0..205).map(|_| deployment.server.connect()).collect();
    page.wait_for("document.querySelector('#shown').textContent.includes('200 of 206 shown')");
    page.wait_for(&format!("{ROWS}.length == 200"));
    others.truncate(3);
    page.wait_for(&format!("{ROWS}.length == 4"));
    let label = "document.activeElement.getAttribute('aria-label')";
    assert_eq!(
        page.run(label),
        json!(format!("Kill connection 1 of {peer}"))
    );

    // Escape cancels the action and returns the focus.
    page.press("Enter");
    page.wait_for("document.querySelector('#confirm').open");
    page.wait_for("document.querySelector('#confirm').contains(document.activeElement)");
    page.press("Escape");
    page.wait_for("!document.querySelector('#confirm').open");
    assert_eq!(
        page.run(label),
        json!(format!("Kill connection 1 of {peer}"))
    );
    client.send("still there");
    assert_eq!(client.read(11), "still there");

    // The harmless button has the focus first.
    page.press("Enter");
    page.wait_for("document.activeElement.textContent == 'Cancel'");
    page.press("Tab");
    page.wait_for("document.activeElement.id == 'confirm-action'");
    page.press("Enter");
    let (_, end) = client.read_all();
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    deployment
        .server
        .wait_for_log(&["connection ended", "killed"]);
    page.wait_for(&format!("{NOTICE} == 'Connection 1 was killed.'"));
    page.wait_for(&format!("{ROWS}.length == 3"));
    page.wait_for("document.querySelector('#services tr.current').innerText.includes('killed: 1')");

    page.run("document.querySelector('#filter').focus()");
    let peer = others[1].0.local_addr().unwrap();
    page.call("Input.insertText", json!({ "text": peer.to_string() }));
    page.wait_for(&format!(
        "{ROWS}.length == 1 && {ROWS}[0].innerText.includes('{peer}')"
    ));
    page.finish(&deployment);
}

#[test]
fn dashboard_swaps_and_rolls_back_a_version() {
    let Some(mut page) = Page::new() else { return };
    let deployment = Deployment::start(&[]);
    page.open(&deployment.with_token());
    let is_echo = |server: &Server| {
        let mut client = server.connect();
        client.send(request("/"));
        client.read(4) == "GET "
    };
    page.wait_for(CURRENT);
    let echo = page.run(CURRENT);
    assert!(is_echo(&deployment.server));
    assert_eq!(
        page.run("document.querySelector('[data-action=rollback]').disabled"),
        json!(true)
    );

    // HTML in the name of a file is shown as text.
    let bad = deployment.directory.path().join("<b>no<b>.wasm");
    std::fs::write(&bad, "no component").unwrap();
    page.choose(&bad);
    page.confirm("<b>no<b>.wasm");
    page.wait_for(&format!("{NOTICE}.includes('failed')"));
    let notice = page.run(NOTICE).to_string();
    assert!(
        notice
            .contains("<b>no<b>.wasm failed: the new version is refused, and nothing has changed"),
        "{notice}"
    );
    assert_eq!(
        page.run("document.querySelectorAll('b:not([data-field])').length"),
        json!(0)
    );
    assert_eq!(page.run(CURRENT), echo);

    page.choose(&guest("hello"));
    page.confirm("hello.wasm");
    page.wait_for(&format!("{CURRENT} != {echo}"));
    page.wait_for(&format!("{NOTICE}.includes('instead of ' + {echo})"));
    assert!(!is_echo(&deployment.server));

    page.wait_for("!document.querySelector('[data-action=rollback]').disabled");
    page.run("document.querySelector('[data-action=rollback]').focus()");
    page.press("Enter");
    page.confirm(echo.as_str().unwrap());
    page.wait_for(&format!("{CURRENT} == {echo}"));
    assert!(is_echo(&deployment.server));
    page.finish(&deployment);
}

#[test]
fn dashboard_asks_for_the_token_and_keeps_it_in_its_tab() {
    let Some(mut page) = Page::new() else { return };
    let deployment = Deployment::start(&[]);
    page.open(&deployment.origin());
    let reason = "document.querySelector('#token-reason').textContent";
    page.wait_for("document.activeElement.id == 'token'");
    page.wait_for(&format!("{reason}.includes('requires a token')"));
    page.call("Input.insertText", json!({ "text": "wrong" }));
    page.press("Enter");
    page.wait_for(&format!("{reason}.includes('does not accept this token')"));
    page.wait_for("document.activeElement.id == 'token'");
    page.call("Input.insertText", json!({ "text": TOKEN }));
    page.press("Enter");
    page.wait_for("!document.querySelector('#dashboard').hidden");
    assert_eq!(
        page.run("document.querySelector('#token-form').hidden"),
        json!(true)
    );
    // The token is stored for this tab only.
    assert_eq!(
        page.run("[localStorage.length, document.cookie, sessionStorage.length]"),
        json!([0, "", 1])
    );

    // A token in the URL is stored and removed from the URL.
    page.run("sessionStorage.clear()");
    page.open(&deployment.with_token());
    page.wait_for("!document.querySelector('#dashboard').hidden");
    assert_eq!(
        page.run("location.href"),
        json!(format!("{}/", deployment.origin()))
    );
    page.finish(&deployment);
}

#[test]
fn dashboard_shows_draining_and_lost_servers_and_recovers() {
    let Some(mut page) = Page::new() else { return };
    let mut deployment = Deployment::start(&[]);
    page.open(&deployment.with_token());
    let client = deployment.server.connect();
    page.wait_for(&format!("{ROWS}.length == 1"));
    deployment.server.signal(Signal::TERM);
    page.wait_for("document.querySelector('#phase').textContent == 'draining'");
    page.wait_for(&format!("{PROBLEM}.includes('The server is draining')"));
    client.finish();
    assert_eq!(deployment.server.wait().code(), Some(0));
    page.wait_for(&format!("{PROBLEM}.includes('cannot be reached')"));
    page.wait_for(&format!("{PROBLEM}.includes('Showing data from')"));
    drop(client);
    deployment.start_again();
    page.wait_for("document.querySelector('#phase').textContent == 'serving'");
    page.wait_for(&format!("{PROBLEM} == '' && {ROWS}.length == 0"));
    page.finish(&deployment);
}

#[test]
fn dashboard_fits_a_phone_and_pauses_while_hidden() {
    let Some(mut page) = Page::new() else { return };
    let deployment = Deployment::start(&["--max-bytes-in", "10"]);
    page.call(
        "Emulation.setDeviceMetricsOverride",
        json!({ "width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": true }),
    );
    let fits = "document.documentElement.scrollWidth <= 360";
    page.open(&deployment.origin());
    page.wait_for("!document.querySelector('#token-form').hidden");
    assert_eq!(page.run(fits), json!(true));
    page.open("about:blank");
    page.open(&deployment.with_token());
    let mut clients: Vec<Client> = (0..3).map(|_| deployment.server.connect()).collect();
    clients[0].send("more than is allowed");
    assert!(clients[0].read_all().1.is_err());
    page.wait_for("document.querySelector('#limits-met').innerText.includes('max-bytes-in')");
    page.wait_for(&format!("{ROWS}.length == 2"));
    page.run("document.querySelector('details').open = true");
    assert_eq!(page.run(fits), json!(true));
    page.run(&format!("{ROWS}[0].querySelector('button').click()"));
    page.wait_for("document.querySelector('#confirm').open");
    assert_eq!(page.run(fits), json!(true));
    page.press("Escape");

    page.run(
        "requests = 0; send = fetch; fetch = (...all) => { requests++; return send(...all) }; null",
    );
    page.wait_for("requests > 0");
    page.run(&hide(true));
    // Only waiting shows that no request is sent: more than two intervals.
    let requests_while_hidden =
        "new Promise(done => setTimeout(done, 2500, requests)).then(before => requests - before)";
    assert_eq!(page.run(requests_while_hidden), json!(0));
    page.run(&hide(false));
    page.run("requests = 0");
    page.wait_for("requests > 0");
    page.finish(&deployment);
}

/// A script that makes the tab hidden or visible to the page.
fn hide(hidden: bool) -> String {
    format!(
        "Object.defineProperty(document, 'hidden', {{ value: {hidden}, configurable: true }});
        document.dispatchEvent(new Event('visibilitychange'))"
    )
}

/// An echo server, with an admin API on a loopback address.
struct Deployment {
    server: Server,
    admin: String,
    directory: tempfile::TempDir,
}

impl Deployment {
    fn start(arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600);
        let mut file = file.open(directory.path().join("token")).unwrap();
        writeln!(file, "{TOKEN}").unwrap();
        let mut server = serve(directory.path(), "127.0.0.1:0", arguments);
        Self {
            admin: server.admin_address(),
            server,
            directory,
        }
    }

    /// Starts a new server at the same admin address.
    fn start_again(&mut self) {
        self.server = serve(self.directory.path(), &self.admin, &[]);
    }

    /// The origin of the dashboard.
    fn origin(&self) -> String {
        format!("http://{}", self.admin)
    }

    /// The URL of the dashboard, with the token in its fragment.
    fn with_token(&self) -> String {
        format!("{}/#token={TOKEN_IN_URL}", self.origin())
    }
}

fn serve(directory: &Path, admin: &str, arguments: &[&str]) -> Server {
    let token = directory.join("token").display().to_string();
    let flags = ["--admin", admin, "--admin-token-file", &token];
    let arguments = [&flags, arguments].concat();
    Server::start("concurrent", &guest("echo"), &arguments)
}

/// A page in a browser of its own. Dropping this kills the browser.
struct Page {
    browser: Child,
    /// The data directory of the browser.
    _profile: tempfile::TempDir,
    socket: WebSocket<TcpStream>,
    session: Option<Value>,
    calls: u64,
    /// Events that the browser has sent.
    events: Vec<Value>,
}

impl Page {
    /// Starts a browser. None if there is none on this machine.
    fn new() -> Option<Self> {
        let Some(chromium) = chromium() else {
            eprintln!(
                "skipped: Chromium is not installed; \
                apt-get install chromium, or set CHROMIUM to its path"
            );
            return None;
        };
        let profile = tempfile::tempdir().unwrap();
        let mut browser = Command::new(chromium)
            .args(["--headless", "--no-sandbox", "--disable-gpu"])
            .args(["--disable-dev-shm-usage", "--no-first-run"])
            .args(["--remote-debugging-port=0", "about:blank"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("Chromium starts");
        let mut lines =
            BufReader::new(browser.stderr.take().expect("standard error is piped")).lines();
        let url = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| Some(line.strip_prefix("DevTools listening on ")?.to_string()))
            .expect("Chromium prints its URL");
        // Chromium blocks when its standard error is full.
        thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        let address = url.split('/').nth(2).expect("the URL has a host");
        let stream = TcpStream::connect(address).expect("Chromium listens");
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (socket, _) = tungstenite::client(&*url, stream).expect("Chromium answers");
        let mut page = Self {
            browser,
            _profile: profile,
            socket,
            session: None,
            calls: 0,
            events: Vec::new(),
        };
        page.attach();
        Some(page)
    }

    /// Opens a tab and subscribes to its events.
    fn attach(&mut self) {
        let target = self.call("Target.createTarget", json!({ "url": "about:blank" }));
        let target = json!({ "targetId": target["targetId"], "flatten": true });
        let session = self.call("Target.attachToTarget", target);
        self.session = Some(session["sessionId"].clone());
        for domain in ["Page", "Runtime", "Network", "Log"] {
            self.call(&format!("{domain}.enable"), json!({}));
        }
    }

    /// Calls a method of the DevTools protocol.
    fn call(&mut self, method: &str, parameters: Value) -> Value {
        self.calls += 1;
        let mut call = json!({ "id": self.calls, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            call["sessionId"] = session.clone();
        }
        let call = Message::text(call.to_string());
        self.socket.send(call).expect("the browser runs");
        loop {
            let message = self.socket.read().expect("the browser answers");
            let Message::Text(text) = message else {
                continue;
            };
            let mut answer: Value = serde_json::from_str(&text).expect("the answer is JSON");
            if answer["id"] == json!(self.calls) {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].take();
            }
            self.events.push(answer);
        }
    }

    fn open(&mut self, url: &str) {
        self.call("Page.navigate", json!({ "url": url }));
    }

    /// Evaluates an expression in the page.
    fn run(&mut self, expression: &str) -> Value {
        let evaluate =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let mut answer = self.call("Runtime.evaluate", evaluate);
        let exception = &answer["exceptionDetails"];
        assert!(exception.is_null(), "{expression}: {exception}");
        answer["result"]["value"].take()
    }

    /// Waits until an expression is true in the page. Exceptions count as false.
    fn wait_for(&mut self, condition: &str) {
        let deadline = Instant::now() + PATIENCE;
        let attempt =
            format!("(() => {{ try {{ return !!({condition}) }} catch {{ return false }} }})()");
        while self.run(&attempt) != json!(true) {
            if Instant::now() > deadline {
                let text = self.run("document.body.innerText");
                let text = text.as_str().unwrap_or_default();
                panic!("never true: {condition}\n{text}\n{:?}", self.errors());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Presses and releases a key.
    fn press(&mut self, key: &str) {
        let (code, text) = match key {
            "Enter" => (13, "\r"),
            "Tab" => (9, ""),
            "Escape" => (27, ""),
            _ => unreachable!("{key} is not pressed here"),
        };
        for kind in ["keyDown", "keyUp"] {
            let text = if kind == "keyDown" { text } else { "" };
            let event = json!({
                "type": kind, "key": key, "code": key, "text": text, "windowsVirtualKeyCode": code,
            });
            self.call("Input.dispatchKeyEvent", event);
        }
    }

    /// Chooses a file in the file picker of the only service.
    fn choose(&mut self, file: &Path) {
        let picker =
            json!({ "expression": "document.querySelector('#services input[type=file]')" });
        let picker = self.call("Runtime.evaluate", picker);
        let chosen = json!({ "files": [file], "objectId": picker["result"]["objectId"] });
        self.call("DOM.setFileInputFiles", chosen);
    }

    /// Confirms the question of the page, which must contain `part`.
    fn confirm(&mut self, part: &str) {
        self.wait_for("document.querySelector('#confirm').open");
        let text = self.run("document.querySelector('#confirm').innerText");
        let text = text.as_str().unwrap_or_default();
        assert!(text.contains(part), "{text}");
        self.press("Tab");
        self.wait_for("document.activeElement.id == 'confirm-action'");
        self.press("Enter");
        self.wait_for("!document.querySelector('#confirm').open");
    }

    /// Asserts that the page had no errors and contacted its server only.
    fn finish(&mut self, deployment: &Deployment) {
        // All events before the answer to this call have been received.
        self.run("null");
        let errors = self.errors();
        assert!(errors.is_empty(), "{errors:?}");
        let origin = format!("{}/", deployment.origin());
        let foreign: Vec<_> = self
            .reported("Network.requestWillBeSent")
            .filter_map(|event| event["request"]["url"].as_str())
            .filter(|url| !url.starts_with(&origin) && !url.starts_with("data:"))
            .filter(|url| *url != "about:blank")
            .collect();
        assert!(foreign.is_empty(), "{foreign:?}");
        let requests = self.reported("Network.requestWillBeSent").count();
        assert!(requests > 3, "the browser reports no requests");
    }

    /// Exceptions and console messages, among them violations of the content security policy.
    ///
    /// Failed requests to the admin API are no errors of the page.
    fn errors(&self) -> Vec<&Value> {
        let exceptions = self.reported("Runtime.exceptionThrown");
        let console = self.reported("Runtime.consoleAPICalled");
        let log = self
            .reported("Log.entryAdded")
            .map(|event| &event["entry"])
            .filter(|entry| entry["source"] != "network" || !is_api_url(&entry["url"]));
        exceptions.chain(console).chain(log).collect()
    }

    /// The parameters of all events of a method.
    fn reported(&self, method: &str) -> impl Iterator<Item = &Value> {
        self.events
            .iter()
            .filter(move |event| event["method"] == method)
            .map(|event| &event["params"])
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let _ = self.browser.kill();
        let _ = self.browser.wait();
    }
}

fn is_api_url(url: &Value) -> bool {
    let path = url.as_str().and_then(|url| url.splitn(4, '/').nth(3));
    path.is_some_and(|path| path.starts_with("v1/"))
}

/// The path of a browser on this machine.
fn chromium() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("CHROMIUM") {
        return Some(path.into());
    }
    let path = std::env::var_os("PATH")?;
    let directories: Vec<_> = std::env::split_paths(&path).collect();
    ["chromium", "chromium-browser", "google-chrome"]
        .iter()
        .flat_map(|name| {
            directories
                .iter()
                .map(move |directory| directory.join(name))
        })
        .find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    let mode = |permissions: Permissions| permissions.mode() & 0o111;
    std::fs::metadata(file).is_ok_and(|file| file.is_file() && mode(file.permissions()) != 0)
}
