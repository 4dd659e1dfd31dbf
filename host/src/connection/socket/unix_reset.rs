//! A reset for Unix sockets: a byte that stays unread.

use std::ffi::c_int;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc::{SO_PEEK_OFF, SOL_SOCKET, c_void, setsockopt, socklen_t};
use rustix::io::readv;
use rustix::net::{RecvFlags, recv};

/// Keeps the last received byte of a Unix socket in the kernel.
///
/// The peer of a Unix socket that is closed with unread data reads an error after all data, instead
/// of the end of the stream. Unix sockets have no other reset. So the last byte of a client stays
/// unread until the connection is finished in order. The kernel remembers how far was peeked.
#[derive(Debug, Default)]
pub(super) struct UnixReset {
    is_enabled: bool,
    /// Received bytes that are still in the kernel.
    unread: usize,
}

impl UnixReset {
    /// Enables the reset, before anything is received.
    pub(super) fn enable(&mut self, socket: BorrowedFd<'_>) {
        self.is_enabled = enable_peek_offset(socket);
    }

    /// Receives the next bytes. The last of them stays in the kernel.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
        if !self.is_enabled {
            return Ok(recv(socket, buf, RecvFlags::DONTWAIT)?.0);
        }
        let (n, _) = recv(socket, &mut *buf, RecvFlags::PEEK | RecvFlags::DONTWAIT)?;
        if n == 0 {
            return Ok(0);
        }
        self.read_all_but(1, socket);
        let mut before = [0; 1];
        let taken = match self.unread {
            // Reads the same bytes to the same place, all but the last. Fewer come if descriptors
            // were sent along (unix(7), `SCM_RIGHTS`): the next call reads the others.
            0 if n == 1 => 0,
            unread @ 0..=1 => {
                let bufs = &mut [
                    IoSliceMut::new(&mut before[..unread]),
                    IoSliceMut::new(&mut buf[..n - 1]),
                ];
                readv(socket, bufs).unwrap_or(0)
            }
            _ => 0,
        };
        self.unread = self.unread + n - taken;
        Ok(n)
    }

    /// Reads what was left in the kernel: closing the socket is an orderly end from now on.
    pub(super) fn disarm(&mut self, socket: BorrowedFd<'_>) {
        self.read_all_but(0, socket);
    }

    fn read_all_but(&mut self, last: usize, socket: BorrowedFd<'_>) {
        while self.unread > last {
            let mut sink = [0; 1024];
            let most = (self.unread - last).min(sink.len());
            match recv(socket, &mut sink[..most], RecvFlags::DONTWAIT) {
                Ok((n @ 1.., _)) => self.unread -= n,
                _ => return,
            }
        }
    }
}

/// Makes the kernel remember how far `MSG_PEEK` has read (socket(7), `SO_PEEK_OFF`). False if it
/// cannot.
fn enable_peek_offset(socket: BorrowedFd<'_>) -> bool {
    let offset: c_int = 0;
    // SAFETY: the kernel reads an int at this address, and is told its size.
    let result = unsafe {
        setsockopt(
            socket.as_raw_fd(),
            SOL_SOCKET,
            SO_PEEK_OFF,
            (&raw const offset).cast::<c_void>(),
            size_of_val(&offset) as socklen_t,
        )
    };
    result == 0
}
