//! The same page over HTTP, from wasinetd and other servers.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::effort::Effort;
use crate::machine;
use crate::native;
use crate::report::{Chart, Section, Table};
use crate::samples::Samples;
use crate::server::{Address, PAGES, Server, wasinetd};
use crate::wrk::{self, CONNECTIONS, Workload};

/// A server to measure if its program is installed.
struct Candidate {
    name: &'static str,
    command: Vec<String>,
    address: Address,
}

/// The servers to measure. The first one, native, is the baseline of all ratios.
fn candidates() -> Result<Vec<Candidate>, String> {
    let printed = |name, command| Candidate {
        name,
        command,
        address: Address::Printed,
    };
    let given = |name, command: &[&str]| Candidate {
        name,
        command: command.iter().map(ToString::to_string).collect(),
        address: Address::Given,
    };
    Ok(vec![
        printed("native, tokio", native::command(&["hello"])),
        printed(
            "native, tokio, one thread",
            native::command(&["one-thread", "hello"]),
        ),
        printed(
            "wasinetd, concurrent",
            wasinetd("concurrent", "hello", &PAGES),
        ),
        printed("wasinetd, spawn", wasinetd("spawn", "hello", &PAGES)),
        given(
            "wasmtime serve, 0.3 guest, instances reused (its default)",
            &wasmtime_serve(&[], P3),
        ),
        given(
            "wasmtime serve, 0.3 guest, fresh instances",
            &wasmtime_serve(&FRESH, P3),
        ),
        given(
            "wasmtime serve, 0.3 guest, fresh instances, tuned pool",
            &wasmtime_serve(&[FRESH.as_slice(), &TUNED].concat(), P3),
        ),
        given(
            "wasmtime serve, 0.2 guest, fresh instances (its default)",
            &wasmtime_serve(&[], P2),
        ),
        given(
            "wasmtime serve, 0.2 guest, fresh instances, tuned pool",
            &wasmtime_serve(&TUNED, P2),
        ),
        given(
            "nginx",
            &nginx()?.iter().map(String::as_str).collect::<Vec<_>>(),
        ),
        given(
            "a process per connection (socat, native handler)",
            &[
                "socat",
                "TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr,nodelay,backlog=1024",
                &format!("EXEC:{},nofork", native::command(&["stdio"]).join(" ")),
            ],
        ),
    ])
}

const P2: &str = "target/guests/bench/http_p2.wasm";
const P3: &str = "target/guests/bench/http_p3.wasm";

/// A fresh instance per request, comparable to wasinetd's fresh instance per connection.
const FRESH: [&str; 2] = ["--max-instance-reuse-count", "1"];

/// The pool settings of wasinetd, applied to `wasmtime serve`.
const TUNED: [&str; 6] = [
    "-O",
    "pooling-memory-keep-resident=2097152",
    "-O",
    "pooling-table-keep-resident=2097152",
    "-O",
    "pooling-pagemap-scan=auto",
];

fn wasmtime_serve<'a>(arguments: &[&'a str], guest: &'a str) -> Vec<&'a str> {
    let mut command = vec!["target/bench/tools/bin/wasmtime", "serve", "-S", "cli"];
    command.extend(["--addr", "127.0.0.1:{port}", "--dir", "static::/static"]);
    command.extend(arguments);
    command.push(guest);
    command
}

/// nginx with default settings and one location.
fn nginx() -> Result<Vec<String>, String> {
    let directory = std::env::current_dir()
        .map_err(|error| error.to_string())?
        .join("target/bench/nginx");
    std::fs::create_dir_all(&directory).map_err(|error| error.to_string())?;
    let directory = directory.display();
    // The port is known only when the server starts, so the shell writes the file then.
    let settings = format!(
        "daemon off; pid {directory}/pid; worker_processes auto; error_log {directory}/error.log; \
         events {{ worker_connections 4096; }} \
         http {{ access_log {directory}/access.log; default_type text/html; sendfile on; \
         tcp_nopush on; keepalive_requests 100000000; client_body_temp_path {directory}; \
         proxy_temp_path {directory}; fastcgi_temp_path {directory}; uwsgi_temp_path {directory}; \
         scgi_temp_path {directory}; \
         server {{ listen 127.0.0.1:{{port}} backlog=4096 reuseport; \
         root {}; index hello.html; }} }}",
        Path::new("static")
            .canonicalize()
            .map_err(|error| format!("static/: {error}"))?
            .display(),
    );
    let script = format!(
        "printf '%s' '{settings}' > {directory}/nginx.conf && \
         exec nginx -p {directory} -e {directory}/error.log -c {directory}/nginx.conf"
    );
    Ok(["sh", "-c", &script].map(String::from).into())
}

fn is_installed(program: &str) -> bool {
    let lookup = format!("command -v '{program}' >/dev/null");
    let mut shell = Command::new("sh");
    shell.args(["-c", &lookup]).stdout(Stdio::null());
    shell.status().is_ok_and(|status| status.success())
}

/// The results of one server.
#[derive(Default)]
struct Row {
    rate: Samples,
    p50: Samples,
    p99: Samples,
    cpu: Samples,
}

pub(crate) fn measure(effort: Effort) -> Result<Section, String> {
    let mut notes = vec![format!(
        "wrk uses one thread and {CONNECTIONS} connections; load and server share {} cores. The \
         native server and wasinetd read the page from disk for each new connection, the guests of \
         wasmtime serve for each request. wasmtime is built by `cargo install`, without \
         whole-program optimization.",
        machine::cores()
    )];
    let mut servers = Vec::new();
    for candidate in candidates()? {
        let program = match candidate.name {
            "nginx" => "nginx",
            _ => &candidate.command[0],
        };
        if is_installed(program) {
            let server = Server::start(candidate.name, &candidate.command, candidate.address)?;
            servers.push(server);
        } else {
            notes.push(format!(
                "Left out: {} ({program} is not installed).",
                candidate.name
            ));
        }
    }
    let mut tables = Vec::new();
    let mut charts = Vec::new();
    for (workload, title, name) in [
        (
            Workload::NewConnections,
            "A new connection for each request",
            "http-new",
        ),
        (
            Workload::KeepAlive,
            "Requests on kept-alive connections",
            "http-kept",
        ),
    ] {
        let rows = measure_rounds(&servers, workload, effort)?;
        tables.push(table(title, &servers, &rows));
        charts.push(chart(name, title, &servers, &rows));
    }
    Ok(Section {
        title: "The same page over HTTP",
        notes,
        tables,
        charts,
    })
}

fn measure_rounds(
    servers: &[Server],
    workload: Workload,
    effort: Effort,
) -> Result<Vec<Row>, String> {
    for server in servers {
        // Warm up caches and pools.
        wrk::run(server.address(), workload, CONNECTIONS, 1)?;
    }
    let mut rows: Vec<Row> = servers.iter().map(|_| Row::default()).collect();
    for _ in 0..effort.rounds {
        for (server, row) in servers.iter().zip(&mut rows) {
            let (result, cpu) = wrk::measure(server, workload, CONNECTIONS, effort.seconds)?;
            row.cpu.push(cpu);
            row.rate.push(result.requests / result.seconds);
            row.p50.push(result.p50);
            row.p99.push(result.p99);
        }
    }
    Ok(rows)
}

fn table(title: &str, servers: &[Server], rows: &[Row]) -> Table {
    let row = |(server, row): (&Server, &Row)| {
        vec![
            server.name().to_string(),
            format!("{:.0}", row.rate.median()),
            format!("{:.0}", row.p50.median()),
            format!("{:.0}", row.p99.median()),
            format!("{:.1}", row.cpu.median()),
            row.cpu.over(&rows[0].cpu).with_spread(2),
        ]
    };
    Table {
        title: title.into(),
        columns: vec![
            "server",
            "requests/s",
            "p50, µs",
            "p99, µs",
            "server CPU per request, µs",
            "CPU, times native",
        ],
        rows: servers.iter().zip(rows).map(row).collect(),
    }
}

/// A chart of every round, which shows the noise.
fn chart(name: &'static str, title: &'static str, servers: &[Server], rows: &[Row]) -> Chart {
    let line = |(server, row): (&Server, &Row)| {
        let points = row.cpu.iter().enumerate();
        let points = points
            .map(|(round, cpu)| (round as f64 + 1.0, cpu))
            .collect();
        (server.name().to_string(), points)
    };
    Chart {
        name,
        title,
        x: "round",
        y: "server CPU per request, µs",
        lines: servers.iter().zip(rows).map(line).collect(),
    }
}
