//! What an operator sees and does in a browser: the dashboard in headless Chromium, which is driven by
//! the DevTools protocol. Where there is no Chromium, these tests say so and are left out.

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

/// As it is in an address. A plus is a plus there.
const TOKEN_IN_ADDRESS: &str = "a+token/that=nobody%2520guesses";

/// The row of a connection that is neither hidden nor kept after its end.
const ROWS: &str = "[...document.querySelectorAll('#connections tbody tr:not(.ended)')]";

/// The version of the guest that new connections are served with.
const CURRENT: &str = "document.querySelector('#services tr.current th')?.textContent";

const NOTICE: &str = "document.querySelector('#notice-text').textContent";

const PROBLEM: &str = "document.querySelector('#problem').textContent";

#[test]
fn a_connection_is_seen_and_killed_by_keyboard() {
    let Some(mut page) = Page::new() else { return };
    let operated = Operated::start(&[]);
    page.open(&operated.with_token());
    let mut client = operated.server.connect();
    client.send("hello");
    assert_eq!(client.read(5), "hello");
    let peer = client.0.local_addr().unwrap();
    page.wait_for(&format!(
        "{ROWS}.some(row => row.innerText.includes('{peer}') && row.innerText.match(/5 B\\s+5 B/))"
    ));

    // The focus stays where it is while other rows come and go around it.
    page.run(&format!("{ROWS}[0].querySelector('button').focus()"));
    let mut others: Vec<Client> = (0..205).map(|_| operated.server.connect()).collect();
    page.wait_for("document.querySelector('#shown').textContent.includes('200 of 206 shown')");
    page.wait_for(&format!("{ROWS}.length == 200"));
    others.truncate(3);
    page.wait_for(&format!("{ROWS}.length == 4"));
    let label = "document.activeElement.getAttribute('aria-label')";
    assert_eq!(
        page.run(label),
        json!(format!("Kill connection 1 of {peer}"))
    );

    // Escape takes it back, and the focus returns.
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

    // What is harmless has the focus first.
    page.press("Enter");
    page.wait_for("document.activeElement.textContent == 'Cancel'");
    page.press("Tab");
    page.wait_for("document.activeElement.id == 'confirm-action'");
    page.press("Enter");
    let (_, end) = client.read_all();
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    operated
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
    page.finish(&operated);
}

#[test]
fn a_version_is_swapped_and_rolled_back() {
    let Some(mut page) = Page::new() else { return };
    let operated = Operated::start(&[]);
    page.open(&operated.with_token());
    let is_echo = |server: &Server| {
        let mut client = server.connect();
        client.send(request("/"));
        client.read(4) == "GET "
    };
    page.wait_for(CURRENT);
    let echo = page.run(CURRENT);
    assert!(is_echo(&operated.server));
    assert_eq!(
        page.run("document.querySelector('[data-action=rollback]').disabled"),
        json!(true)
    );

    // The name of a file is text, whatever it says.
    let bad = operated.directory.path().join("<b>no<b>.wasm");
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
    page.wait_for(&format!("{NOTICE}.includes('and no longer ' + {echo})"));
    assert!(!is_echo(&operated.server));

    page.wait_for("!document.querySelector('[data-action=rollback]').disabled");
    page.run("document.querySelector('[data-action=rollback]').focus()");
    page.press("Enter");
    page.confirm(echo.as_str().unwrap());
    page.wait_for(&format!("{CURRENT} == {echo}"));
    assert!(is_echo(&operated.server));
    page.finish(&operated);
}

#[test]
fn the_page_asks_for_the_token_and_forgets_none() {
    let Some(mut page) = Page::new() else { return };
    let operated = Operated::start(&[]);
    page.open(&operated.origin());
    let reason = "document.querySelector('#token-reason').textContent";
    page.wait_for("document.activeElement.id == 'token'");
    page.wait_for(&format!("{reason}.includes('only those who show')"));
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
    // It is for this tab, and nowhere else.
    assert_eq!(
        page.run("[localStorage.length, document.cookie, sessionStorage.length]"),
        json!([0, "", 1])
    );

    // One in the address is taken, and does not stay there.
    page.run("sessionStorage.clear()");
    page.open(&operated.with_token());
    page.wait_for("!document.querySelector('#dashboard').hidden");
    assert_eq!(
        page.run("location.href"),
        json!(format!("{}/", operated.origin()))
    );
    page.finish(&operated);
}

#[test]
fn the_page_says_that_the_server_drains_or_is_gone_and_recovers() {
    let Some(mut page) = Page::new() else { return };
    let mut operated = Operated::start(&[]);
    page.open(&operated.with_token());
    let client = operated.server.connect();
    page.wait_for(&format!("{ROWS}.length == 1"));
    operated.server.signal(Signal::TERM);
    page.wait_for("document.querySelector('#phase').textContent == 'draining'");
    page.wait_for(&format!("{PROBLEM}.includes('The server is draining')"));
    client.finish();
    assert_eq!(operated.server.wait().code(), Some(0));
    page.wait_for(&format!("{PROBLEM}.includes('cannot be reached')"));
    page.wait_for(&format!("{PROBLEM}.includes('What is shown is from')"));
    drop(client);
    operated.start_again();
    page.wait_for("document.querySelector('#phase').textContent == 'serving'");
    page.wait_for(&format!("{PROBLEM} == '' && {ROWS}.length == 0"));
    page.finish(&operated);
}

#[test]
fn the_page_fits_a_phone_and_rests_while_it_is_hidden() {
    let Some(mut page) = Page::new() else { return };
    let operated = Operated::start(&["--max-bytes-in", "10"]);
    page.call(
        "Emulation.setDeviceMetricsOverride",
        json!({ "width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": true }),
    );
    let fits = "document.documentElement.scrollWidth <= 360";
    page.open(&operated.origin());
    page.wait_for("!document.querySelector('#token-form').hidden");
    assert_eq!(page.run(fits), json!(true));
    page.open("about:blank");
    page.open(&operated.with_token());
    let mut clients: Vec<Client> = (0..3).map(|_| operated.server.connect()).collect();
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

    page.run("asked = 0; ask = fetch; fetch = (...all) => { asked++; return ask(...all) }; null");
    page.wait_for("asked > 0");
    page.run(&hide(true));
    // Nothing tells that nothing comes but to wait for it: for more than two intervals.
    let meanwhile =
        "new Promise(done => setTimeout(done, 2500, asked)).then(before => asked - before)";
    assert_eq!(page.run(meanwhile), json!(0));
    page.run(&hide(false));
    page.run("asked = 0");
    page.wait_for("asked > 0");
    page.finish(&operated);
}

/// What a page sees when its tab is put behind another one, or before it again.
fn hide(hidden: bool) -> String {
    format!(
        "Object.defineProperty(document, 'hidden', {{ value: {hidden}, configurable: true }});
        document.dispatchEvent(new Event('visibilitychange'))"
    )
}

/// A server of the echo guest whose operators connect to a loopback address.
struct Operated {
    server: Server,
    admin: String,
    directory: tempfile::TempDir,
}

impl Operated {
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

    /// Another server where the first one was, which has ended.
    fn start_again(&mut self) {
        self.server = serve(self.directory.path(), &self.admin, &[]);
    }

    fn origin(&self) -> String {
        format!("http://{}", self.admin)
    }

    fn with_token(&self) -> String {
        format!("{}/#token={TOKEN_IN_ADDRESS}", self.origin())
    }
}

fn serve(directory: &Path, admin: &str, arguments: &[&str]) -> Server {
    let token = directory.join("token").display().to_string();
    let operated = ["--admin", admin, "--admin-token-file", &token];
    let arguments = [&operated, arguments].concat();
    Server::start("concurrent", &guest("echo"), &arguments)
}

/// A page in a browser of its own, which is killed when this is dropped.
struct Page {
    browser: Child,
    /// What the browser keeps: gone when the browser is.
    _profile: tempfile::TempDir,
    socket: WebSocket<TcpStream>,
    session: Option<Value>,
    calls: u64,
    /// What the browser reported unasked.
    events: Vec<Value>,
}

impl Page {
    /// None where there is no browser.
    fn new() -> Option<Self> {
        let Some(chromium) = chromium() else {
            eprintln!(
                "left out: there is no Chromium to show the dashboard in; \
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
        let mut lines = BufReader::new(browser.stderr.take().expect("it is piped")).lines();
        let url = lines
            .by_ref()
            .map_while(Result::ok)
            .find_map(|line| Some(line.strip_prefix("DevTools listening on ")?.to_string()))
            .expect("Chromium says where to connect");
        // It would stop when nobody reads what it says.
        thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        let address = url.split('/').nth(2).expect("it has an address");
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
        self.socket.send(call).expect("the browser lives");
        loop {
            let message = self.socket.read().expect("the browser answers");
            let Message::Text(text) = message else {
                continue;
            };
            let mut answer: Value = serde_json::from_str(&text).expect("it is JSON");
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

    /// The value of an expression in the page.
    fn run(&mut self, expression: &str) -> Value {
        let evaluate =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let mut answer = self.call("Runtime.evaluate", evaluate);
        let exception = &answer["exceptionDetails"];
        assert!(exception.is_null(), "{expression}: {exception}");
        answer["result"]["value"].take()
    }

    /// Waits until an expression is true in the page. What it is about may not be there yet.
    fn wait_for(&mut self, condition: &str) {
        let deadline = Instant::now() + PATIENCE;
        let attempt =
            format!("(() => {{ try {{ return !!({condition}) }} catch {{ return false }} }})()");
        while self.run(&attempt) != json!(true) {
            if Instant::now() > deadline {
                let text = self.run("document.body.innerText");
                let text = text.as_str().unwrap_or_default();
                panic!("never so: {condition}\n{text}\n{:?}", self.complaints());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

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

    /// Chooses a file as the picker of the only service would.
    fn choose(&mut self, file: &Path) {
        let picker =
            json!({ "expression": "document.querySelector('#services input[type=file]')" });
        let picker = self.call("Runtime.evaluate", picker);
        let chosen = json!({ "files": [file], "objectId": picker["result"]["objectId"] });
        self.call("DOM.setFileInputFiles", chosen);
    }

    /// Confirms what is asked, which has to say `part`.
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

    /// Asserts that the browser had nothing to complain about, and asked nobody but the server.
    fn finish(&mut self, operated: &Operated) {
        // All that was reported before the answer is known then.
        self.run("null");
        let complaints = self.complaints();
        assert!(complaints.is_empty(), "{complaints:?}");
        let origin = format!("{}/", operated.origin());
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

    /// Exceptions, and what is in the console, violations of the page's policy among it. That the server
    /// refuses, or is gone, is not the page's fault.
    fn complaints(&self) -> Vec<&Value> {
        let exceptions = self.reported("Runtime.exceptionThrown");
        let console = self.reported("Runtime.consoleAPICalled");
        let log = self
            .reported("Log.entryAdded")
            .map(|event| &event["entry"])
            .filter(|entry| entry["source"] != "network" || !is_of_api(&entry["url"]));
        exceptions.chain(console).chain(log).collect()
    }

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

fn is_of_api(url: &Value) -> bool {
    let path = url.as_str().and_then(|url| url.splitn(4, '/').nth(3));
    path.is_some_and(|path| path.starts_with("v1/"))
}

/// A browser of this machine.
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
