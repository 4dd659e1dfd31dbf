//! Answers one HTTP request of any kind. Measures the cost of a guest's size.
//!
//! The environment variable `PADDING_KIB` sets the size of its data at compile time.

use std::hint::black_box;

use futures::{AsyncReadExt, AsyncWriteExt};
use wasinetd_guest::TcpStream;

wasinetd_guest::export!(handle_connection);

const PADDING_KIB: usize = match option_env!("PADDING_KIB") {
    Some(digits) => number(digits),
    None => 0,
};

/// The bytes are not zero, because the file would not contain zeros.
static PADDING: [u8; PADDING_KIB * 1024] = [1; PADDING_KIB * 1024];

const fn number(digits: &str) -> usize {
    match usize::from_str_radix(digits, 10) {
        Ok(number) => number,
        Err(_) => panic!("PADDING_KIB is not a number"),
    }
}

async fn handle_connection(mut stream: TcpStream) -> std::io::Result<()> {
    // The linker would drop the data if no code used it.
    black_box(PADDING.as_ptr());
    let mut request = [0; 1024];
    if stream.read(&mut request).await? > 0 {
        stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n")
            .await?;
    }
    Ok(())
}
