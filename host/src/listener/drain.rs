//! Closing a listener without losing a client whose handshake is under way.
//!
//! Closing it at once would reset such a client, though it may have seen its connection completed
//! and sent its request. So new handshakes are ignored first, and those under way are waited for. Unix
//! sockets have none: who connects is in the backlog at once, or refused.

use std::io;
use std::net::Shutdown;
use std::time::Duration;

use socket2::{SockFilter, SockRef};
use tracing::debug;

use super::Listener;

/// How often the kernel is asked for handshakes under way. The first time is after one pause too: a
/// first packet that had passed the filter's place when it came is a handshake by then.
const PAUSE: Duration = Duration::from_millis(10);

/// How many pauses there are at most: as long as a lost answer to a first packet takes to be sent
/// again (one second, RFC 6298, section 2), and a round trip. A client that does not complete its
/// handshake in that time is not waited for.
const PAUSES: u32 = 150;

/// How many pauses there are where the kernel does not tell.
const BLIND_PAUSES: u32 = 10;

/// Makes the kernel refuse new clients at `listener`, if it is ours alone: what is done to a socket is
/// done to it for all who have it open, and stays when we are gone.
pub(super) fn refuse_clients(listener: &Listener) {
    if listener.is_shared() {
        return;
    }
    if listener.port().is_some() {
        return refuse_handshakes(listener);
    }
    // Who comes after this is refused, and who came before can be accepted still.
    if let Err(error) = SockRef::from(listener).shutdown(Shutdown::Read) {
        debug!(%error, "cannot refuse new clients; one that connects now may be reset");
    }
}

/// Makes the kernel ignore new handshakes on `listener`, while those under way complete.
///
/// A client whose first packet is ignored sends it again after a second: it then meets our
/// successor, or learns that there is none.
fn refuse_handshakes(listener: &Listener) {
    /// Offset of the flags in a TCP header (RFC 9293, section 3.1), where the filter's view starts.
    const FLAGS: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    // Classic BPF: load the flags, keep SYN and ACK, drop the packet if it is SYN alone.
    let program = [
        SockFilter::new(0x30, 0, 0, FLAGS),
        SockFilter::new(0x54, 0, 0, SYN | ACK),
        SockFilter::new(0x15, 0, 1, SYN),
        SockFilter::new(0x06, 0, 0, 0),
        SockFilter::new(0x06, 0, 0, u32::MAX),
    ];
    if let Err(error) = SockRef::from(listener).attach_filter(&program) {
        debug!(%error, "cannot refuse new handshakes; a client that connects now may be reset");
    }
}

/// Waits until no handshake is under way on any of `ports`, or has been for too long.
pub(super) async fn handshakes_completed(ports: Vec<u16>) {
    for pause in 1..=PAUSES {
        tokio::time::sleep(PAUSE).await;
        let ports = ports.clone();
        // The table is as long as the machine has sockets.
        let under_way = tokio::task::spawn_blocking(move || handshakes_under_way(&ports)).await;
        match under_way {
            Ok(Ok(false)) => return,
            Ok(Ok(true)) => {}
            _ if pause >= BLIND_PAUSES => return,
            _ => {}
        }
    }
}

/// Whether the kernel has answered the first packet of a client to one of `ports`, and waits for
/// the client's own answer.
fn handshakes_under_way(ports: &[u16]) -> io::Result<bool> {
    Ok(
        has_half_open(&std::fs::read_to_string("/proc/self/net/tcp")?, ports)
        // A kernel without IPv6 has no such file.
        || std::fs::read_to_string("/proc/self/net/tcp6").is_ok_and(|t| has_half_open(&t, ports)),
    )
}

/// Whether `table`, in the format of proc_net_tcp (Linux's documentation), has a socket in the
/// state SYN_RECV at one of the local `ports`.
fn has_half_open(table: &str, ports: &[u16]) -> bool {
    const SYN_RECV: &str = "03";
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let local = fields.next().and_then(|address| address.rsplit_once(':'));
        let state = fields.nth(1);
        let port = local.and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
        state == Some(SYN_RECV) && port.is_some_and(|port| ports.contains(&port))
    })
}

#[cfg(test)]
mod tests {
    use super::has_half_open;

    #[test]
    fn half_open_connections_are_found_by_port_and_state() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when\n\
            \x20  0: 0100007F:1EC6 00000000:0000 0A 00000000:00000000 00:00000000\n\
            \x20  1: 0100007F:1EC6 0100007F:E64E 01 00000000:00000000 00:00000000\n\
            \x20  2: 0100007F:1EC7 0100007F:E64F 03 00000000:00000000 01:00000063\n";
        assert!(!has_half_open(table, &[0x1EC6]));
        assert!(has_half_open(table, &[0x1EC6, 0x1EC7]));
        assert!(!has_half_open("", &[0x1EC6]));
    }
}
