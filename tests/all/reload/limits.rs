//! Limits that hold, and change, across reloads.

use std::fs;
use std::net::SocketAddr;

use rustix::process::{Resource, Rlimit, getrlimit, prlimit};

use crate::config::{Config, connect, echoes, listens, service};
use crate::harness::{Server, free_address, guest};

use super::helpers::{connect_served, echo_at};

#[test]
fn open_connections_count_towards_the_limit_after_a_reload() {
    let (one, two) = (free_address(), free_address());
    let banner = "when-full = 'close'\nfull-banner = 'full'\nmax-connections-per-source = 'off'";
    let with = |listen: &[SocketAddr], more: &str| {
        let listen: Vec<_> = listen.iter().map(ToString::to_string).collect();
        echo_at("one", &listen, &format!("{banner}\n{more}"))
    };
    let config = Config::new(&with(&[one], "max-connections = 1"));
    let _server = Server::start_config(&config.path, 1);
    let mut open = vec![connect_served(one)];
    let assert_full = |address| assert_eq!(connect(address).read_to_end(), "full");
    assert_full(one);
    config.write(&with(&[one, two], "max-connections = 1"));
    assert_eq!(config.reload(), "changed: one");
    assert_full(one);
    assert_full(two);
    config.write(&with(
        &[one, two],
        "max-connections = 1\nidle-timeout = '50s'",
    ));
    assert_eq!(config.reload(), "changed: one");
    assert_full(one);
    config.write(&with(&[one, two], "max-connections = 3"));
    config.reload();
    open.extend([connect_served(two), connect_served(one)]);
    assert_full(two);
    // Below the number of open connections: new clients are refused until enough have closed.
    config.write(&with(&[one, two], "max-connections = 1"));
    config.reload();
    assert_full(one);
    assert_eq!(config.admin.ctl_json(&["status"])["open"], 3);
    open.clear();
    config.admin.wait_for_no_connections();
    drop(connect_served(two));
}

#[test]
fn open_connections_count_towards_their_source_after_a_reload() {
    let at = free_address();
    let with = |more: &str| {
        let more = format!("max-connections-per-source = 1\n{more}");
        echo_at("one", &[at.to_string()], &more)
    };
    let config = Config::new(&with(""));
    let server = Server::start_config(&config.path, 1);
    let mut first = connect_served(at);
    for n in 1..3 {
        config.write(&with(&format!("idle-timeout = '{n}h'")));
        assert_eq!(config.reload(), "changed: one");
        assert!(connect(at).read_all().1.is_err());
    }
    first.finish();
    first.read_to_end();
    server.wait_for_log(&["connection ended", "outcome=ok"]);
    drop(connect_served(at));
}

#[test]
fn a_reload_that_runs_out_of_file_descriptors_changes_nothing() {
    let one = service("one", guest("echo"), "");
    let config = Config::new(&one);
    let server = Server::start_config(&config.path, 1);
    let at = server.address();
    let pid = Some(server.pid());
    let before = getrlimit(Resource::Nofile);
    let files = format!("/proc/{}/fd", server.pid().as_raw_nonzero());
    let other = service("one", guest("echo"), "idle-timeout = '50s'");
    config.write(
        &(other + &service("two", guest("echo"), "") + &service("three", guest("echo"), "")),
    );
    let mut failed = 0;
    // With each further descriptor, the reload fails at a later step.
    for spare in 4.. {
        let open = fs::read_dir(&files).unwrap().count() as u64;
        let limit = Rlimit {
            current: Some(open + spare),
            ..before
        };
        prlimit(pid, Resource::Nofile, limit).unwrap();
        let succeeded = config.admin.ctl(&["reload"]).status.success();
        prlimit(pid, Resource::Nofile, before).unwrap();
        echoes(at);
        if succeeded {
            break;
        }
        failed += 1;
        let status = config.admin.ctl_json(&["status"]);
        assert_eq!(status["services"].as_array().unwrap().len(), 1, "{status}");
    }
    assert!(failed > 3, "the reload failed only {failed} times");
    echoes(listens(&server, "two"));
    echoes(listens(&server, "three"));
}
