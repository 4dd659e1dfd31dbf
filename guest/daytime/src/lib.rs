//! The daytime protocol (RFC 867).
//!
//! The guest sends one line with the date and time and ignores all input. The RFC leaves the format
//! open. The guest uses that of HTTP, `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, section 5.6.7): it
//! has a fixed length, is in UTC, and every language has a parser for it.

use std::io;
use std::time::SystemTime;

use futures::{AsyncWrite, AsyncWriteExt};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

async fn handle_connection(stream: TcpStream) -> io::Result<()> {
    daytime(stream, SystemTime::now()).await
}

/// Sends the line for `now`, a time from 1970 to 9999.
///
/// # Errors
///
/// Fails when `writer` fails.
pub async fn daytime(mut writer: impl AsyncWrite + Unpin, now: SystemTime) -> io::Result<()> {
    let line = format!("{}\r\n", httpdate::fmt_http_date(now));
    writer.write_all(line.as_bytes()).await
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use futures::executor::block_on;

    use super::*;

    #[test]
    fn the_answer_is_one_line() {
        let mut written = Vec::new();
        let now = UNIX_EPOCH + Duration::from_secs(784_111_777);
        block_on(daytime(&mut written, now)).unwrap();
        assert_eq!(written, b"Sun, 06 Nov 1994 08:49:37 GMT\r\n");
    }
}
