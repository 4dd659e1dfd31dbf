//! Settings of listening sockets.

use std::io;
use std::time::Duration;

use socket2::{Domain, Socket, TcpKeepalive};

use crate::net::SocketPermissions;

/// Settings of the sockets of a service.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SocketSettings {
    /// Connections that the kernel keeps until they are accepted, per socket (listen(2)).
    ///
    /// The kernel lowers this to `net.core.somaxconn`.
    pub backlog: u32,
    /// Whether other processes of this user may bind the same TCP ports.
    ///
    /// With `SO_REUSEPORT`, the kernel then spreads clients over the processes.
    pub reuse_port: bool,
    /// Idle time before TCP keepalive probes start. None sends no probes.
    ///
    /// The connection of an unreachable client ends after twice this time.
    pub keepalive: Option<Duration>,
    /// Users that may connect to Unix sockets.
    pub permissions: SocketPermissions,
}

impl Default for SocketSettings {
    /// The backlog is the kernel's default of `net.core.somaxconn`.
    fn default() -> Self {
        Self {
            backlog: 4096,
            reuse_port: false,
            keepalive: None,
            permissions: SocketPermissions::default(),
        }
    }
}

impl SocketSettings {
    /// The backlog, as listen(2) takes it.
    pub(super) fn backlog(&self) -> i32 {
        i32::try_from(self.backlog).unwrap_or(i32::MAX)
    }

    /// Sets TCP keepalive on a listening socket. Accepted sockets inherit the option.
    pub(super) fn set_keepalive(&self, socket: &Socket) -> io::Result<()> {
        /// Unanswered probes that end a connection.
        const PROBES: u32 = 4;
        if socket.domain()? == Domain::UNIX {
            return Ok(());
        }
        let Some(idle_time) = self.keepalive else {
            return socket.set_keepalive(false);
        };
        // The kernel counts in whole seconds (tcp(7)).
        let interval = Duration::from_secs((idle_time / PROBES).as_secs().max(1));
        let keepalive = TcpKeepalive::new()
            .with_time(idle_time)
            .with_interval(interval)
            .with_retries(PROBES);
        socket.set_tcp_keepalive(&keepalive)
    }
}
