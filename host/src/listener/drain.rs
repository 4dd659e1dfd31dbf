//! Closing a listener without losing clients whose handshakes are under way.
//!
//! Closing at once would reset such a client, although it may have seen its connection established
//! and sent its request. So new TCP handshakes are ignored first, and those under way may complete.
//! Unix sockets have no handshake: a client is in the backlog at once, or refused.

use std::io;
use std::net::Shutdown;
use std::time::Duration;

use socket2::{SockFilter, SockRef};
use tracing::debug;

use super::listening::Listener;

/// Interval between two looks at the handshakes under way.
///
/// There is a pause before the first look too. A SYN that passed just before the filter was set has
/// become a handshake by then.
const PAUSE: Duration = Duration::from_millis(10);

/// Most pauses. A client that takes longer loses its handshake.
///
/// They last as long as a lost SYN-ACK takes to be sent again (one second, RFC 6298, section 2) and
/// a round trip.
const MAX_PAUSES: u32 = 150;

/// Most pauses if the kernel does not report the handshakes.
const MAX_BLIND_PAUSES: u32 = 10;

/// Makes the kernel refuse new clients at `listener`.
///
/// A shared listener stays as it is: a filter or a shutdown affects every process that has the
/// socket open, and lasts beyond this one.
pub(super) fn refuse_clients(listener: &Listener) {
    if listener.is_shared() {
        return;
    }
    if listener.port().is_some() {
        return refuse_handshakes(listener);
    }
    // Later clients are refused. Earlier ones stay in the backlog and can still be accepted.
    if let Err(error) = SockRef::from(listener).shutdown(Shutdown::Read) {
        debug!(%error, "cannot refuse new clients; one that connects now may be reset");
    }
}

/// Makes the kernel ignore new handshakes on `listener`. Those under way can complete.
///
/// A client sends an ignored SYN again after a second. By then it reaches the next server, or is
/// refused because there is none.
fn refuse_handshakes(listener: &Listener) {
    /// Offset of the flags in a TCP header (RFC 9293, section 3.1).
    ///
    /// The filter sees a packet from its TCP header on.
    const FLAGS: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    // Classic BPF: load the flags, keep SYN and ACK, drop the packet if only SYN is set.
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

/// Waits a bounded time until no handshake is under way on `ports`.
pub(super) async fn handshakes_completed(ports: Vec<u16>) {
    for pause in 1..=MAX_PAUSES {
        tokio::time::sleep(PAUSE).await;
        let ports = ports.clone();
        // The table has a line for each socket of the machine, so reading it may take long.
        let under_way = tokio::task::spawn_blocking(move || handshakes_under_way(&ports)).await;
        match under_way {
            Ok(Ok(false)) => return,
            Ok(Ok(true)) => {}
            _ if pause >= MAX_BLIND_PAUSES => return,
            _ => {}
        }
    }
}

/// Whether a handshake to one of `ports` waits for its final ACK.
fn handshakes_under_way(ports: &[u16]) -> io::Result<bool> {
    if has_half_open(&std::fs::read_to_string("/proc/self/net/tcp")?, ports) {
        return Ok(true);
    }
    // A kernel without IPv6 has no such file.
    let ipv6 = std::fs::read_to_string("/proc/self/net/tcp6");
    Ok(ipv6.is_ok_and(|table| has_half_open(&table, ports)))
}

/// Whether `table` has a socket in state SYN_RECV at local `ports`.
///
/// The format is that of `/proc/net/tcp` (kernel documentation, "proc_net_tcp").
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
