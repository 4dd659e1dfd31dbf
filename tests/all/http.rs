//! The web server of the Rust book, as the guest `hello`.

use std::io::Write;
use std::time::Instant;

use crate::harness::{MODES, Server, curl, guest, page, request};

fn hello(mode: &str) -> Server {
    Server::start(mode, &guest("hello"), &["--dir", "static::/static"])
}

#[test]
fn curl_gets_the_pages() {
    for mode in MODES {
        let server = hello(mode);
        assert_eq!(curl(&server, "/", &[]), page("hello.html"));
        assert_eq!(curl(&server, "/nope", &[]), page("404.html"));
        assert_eq!(
            curl(
                &server,
                "/",
                &[
                    "--output",
                    "/dev/null",
                    "--write-out",
                    "%{http_code} %{content_type}"
                ]
            ),
            "200 text/html; charset=utf-8"
        );
        assert_eq!(
            curl(
                &server,
                "/nope",
                &["--output", "/dev/null", "--write-out", "%{http_code}"]
            ),
            "404"
        );
    }
}

#[test]
fn curl_waits_five_seconds_for_the_sleep_page() {
    for mode in MODES {
        let server = hello(mode);
        let start = Instant::now();
        assert_eq!(curl(&server, "/sleep", &[]), page("hello.html"));
        assert!(
            start.elapsed().as_secs_f64() >= 5.0,
            "after {:?}",
            start.elapsed()
        );
    }
}

#[test]
fn curl_head_has_no_body() {
    for mode in MODES {
        let head = curl(&hello(mode), "/", &["--head"]);
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(
            head.contains(&format!("Content-Length: {}\r\n", page("hello.html").len())),
            "{head}"
        );
        assert!(head.ends_with("\r\n\r\n"), "{head}");
    }
}

#[test]
fn curl_post_is_not_allowed() {
    for mode in MODES {
        let server = hello(mode);
        let answer = curl(&server, "/", &["--include", "--data", "a=b"]);
        assert!(
            answer.starts_with("HTTP/1.1 405 Method Not Allowed\r\n"),
            "{answer}"
        );
        assert!(answer.contains("Allow: GET, HEAD\r\n"), "{answer}");
    }
}

#[test]
fn a_large_post_is_answered_without_reading_its_body() {
    for mode in MODES {
        let server = hello(mode);
        let mut client = server.connect();
        client.send("POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000\r\n\r\n");
        client.send(vec![b'x'; 1_000_000]);
        let response = client.response();
        assert_eq!(response.status(), "405 Method Not Allowed");
        assert!(
            response.head.contains("Connection: close\r\n"),
            "{}",
            response.head
        );
        assert_eq!(client.read_to_end(), "");
    }
}

#[test]
fn curl_cannot_leave_the_directory() {
    for mode in MODES {
        let server = hello(mode);
        for path in [
            "/../Cargo.toml",
            "/..%2fCargo.toml",
            "//etc/passwd",
            "/static/hello.html",
        ] {
            assert_eq!(
                curl(&server, path, &["--path-as-is"]),
                page("404.html"),
                "{path}"
            );
        }
    }
}

#[test]
fn a_connection_serves_many_requests() {
    for mode in MODES {
        let server = hello(mode);
        let mut client = server.connect();
        for _ in 0..3 {
            assert_eq!(client.get("/").body, page("hello.html"));
            assert_eq!(client.get("/nope").body, page("404.html"));
        }
        drop(client);
        server.wait_for_log(&["connection ended", "outcome=ok"]);
        assert_eq!(server.log_lines("connection ended").len(), 1);
    }
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    for mode in MODES {
        let server = hello(mode);
        let mut client = server.connect();
        client.send([request("/"), request("/nope"), request("/")].concat());
        assert_eq!(client.response().status(), "200 OK");
        assert_eq!(client.response().status(), "404 Not Found");
        assert_eq!(client.response().body, page("hello.html"));
    }
}

#[test]
fn a_request_may_arrive_byte_by_byte() {
    for mode in MODES {
        let server = hello(mode);
        let mut client = server.connect();
        for byte in request("/").as_bytes() {
            client.0.write_all(&[*byte]).unwrap();
        }
        assert_eq!(client.response().body, page("hello.html"));
    }
}

#[test]
fn close_and_http_1_0_end_the_connection() {
    for mode in MODES {
        let server = hello(mode);
        for request in [
            "GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n",
            "GET / HTTP/1.0\r\n\r\n",
        ] {
            let mut client = server.connect();
            client.send(request);
            let answer = client.read_to_end();
            assert!(answer.ends_with(&page("hello.html")), "{answer}");
            assert!(answer.contains("Connection: close\r\n"), "{answer}");
        }
    }
}

#[test]
fn invalid_requests_are_refused() {
    for mode in MODES {
        let server = hello(mode);
        let long = format!(
            "GET / HTTP/1.1\r\nHost: test\r\nX: {}\r\n\r\n",
            "x".repeat(9000)
        );
        for (request, status) in [
            ("\x16\x03\x01\r\n\r\n", "400 Bad Request"),
            ("GET / HTTP/1.1\r\n\r\n", "400 Bad Request"),
            (long.as_str(), "431 Request Header Fields Too Large"),
        ] {
            let mut client = server.connect();
            client.send(request);
            assert_eq!(client.response().status(), status);
            assert_eq!(client.read_to_end(), "");
        }
    }
}
