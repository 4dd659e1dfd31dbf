//! Answers one HTTP request, whatever it is, and carries as many KiB of data along as
//! `PADDING_KIB` says when it is compiled: for what the size of a guest costs.

use std::hint::black_box;

use futures::{AsyncReadExt, AsyncWriteExt};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

const PADDING_KIB: usize = match option_env!("PADDING_KIB") {
    Some(digits) => number(digits),
    None => 0,
};

/// Not zero, or it would not be in the file.
static PADDING: [u8; PADDING_KIB * 1024] = [1; PADDING_KIB * 1024];

const fn number(digits: &str) -> usize {
    match usize::from_str_radix(digits, 10) {
        Ok(number) => number,
        Err(_) => panic!("PADDING_KIB is not a number"),
    }
}

async fn handle_connection(mut stream: TcpStream) -> std::io::Result<()> {
    // What nobody could ever look at would not be in the file either.
    black_box(PADDING.as_ptr());
    let mut request = [0; 1024];
    if stream.read(&mut request).await? > 0 {
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n")
            .await?;
    }
    Ok(())
}
