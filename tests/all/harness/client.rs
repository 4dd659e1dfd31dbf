//! A client on a raw socket.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, Type};

use super::machine::PATIENCE;

/// A raw connection. A read fails when nothing arrives within [`PATIENCE`].
pub(crate) struct Client<S = TcpStream>(pub(crate) S);

/// The common operations of stream sockets.
pub(crate) trait StreamSocket: Read + Write {
    /// Closes the socket for writing.
    fn finish(&self) -> io::Result<()>;
}

impl StreamSocket for TcpStream {
    fn finish(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl StreamSocket for UnixStream {
    fn finish(&self) -> io::Result<()> {
        self.shutdown(Shutdown::Write)
    }
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> io::Result<Self> {
        Self::new(TcpStream::connect(address)?)
    }

    /// Connects to `address` from the local address `source`.
    pub(crate) fn connect_from(source: &str, address: SocketAddr) -> io::Result<Self> {
        let source: IpAddr = source.parse().expect("the test names an IP address");
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
        socket.connect(&address.into())?;
        Self::new(socket.into())
    }

    fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self(stream))
    }

    /// Closes the connection by a reset (RST).
    pub(crate) fn reset(self) {
        let linger = SockRef::from(&self.0).set_linger(Some(Duration::ZERO));
        linger.expect("the socket is open");
    }

    /// The local address as log lines show it: `peer=ADDRESS `.
    pub(crate) fn peer_field(&self) -> String {
        let address = self.0.local_addr().expect("the socket is bound");
        format!("peer={address} ")
    }
}

impl Client<UnixStream> {
    pub(crate) fn connect_unix(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }
}

impl<S: StreamSocket> Client<S> {
    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0
            .write_all(bytes.as_ref())
            .expect("the server receives the bytes");
    }

    /// Closes the connection for writing.
    pub(crate) fn finish(&self) {
        self.0.finish().expect("the connection is open");
    }

    /// Reads to the end of the stream, or to an error.
    pub(crate) fn read_all(&mut self) -> (Vec<u8>, io::Result<()>) {
        let mut bytes = Vec::new();
        let end = self.0.read_to_end(&mut bytes).map(drop);
        (bytes, end)
    }

    /// Reads text to the end of the stream, which must be orderly (FIN).
    pub(crate) fn read_to_end(&mut self) -> String {
        let (bytes, end) = self.read_all();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        end.unwrap_or_else(|error| panic!("{error} after {text:?}"));
        text
    }

    /// Reads the next `n` bytes.
    pub(crate) fn read(&mut self, n: usize) -> String {
        let mut bytes = vec![0; n];
        self.0.read_exact(&mut bytes).expect("n bytes arrive");
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Reads one line, and returns it without its line end.
    pub(crate) fn read_line(&mut self) -> String {
        self.read_until("\n").trim_end().into()
    }

    /// Reads up to and including `end`.
    pub(crate) fn read_until(&mut self, end: &str) -> String {
        let mut text = Vec::new();
        while !text.ends_with(end.as_bytes()) {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap_or_else(|error| {
                panic!("{error} after {:?}", String::from_utf8_lossy(&text))
            });
            text.push(byte[0]);
        }
        String::from_utf8(text).expect("the answer is text")
    }

    /// Reads one HTTP response that has a body.
    pub(crate) fn try_response(&mut self) -> io::Result<Response> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let head = String::from_utf8_lossy(&head).into_owned();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("Content-Length: ")?.parse().ok())
            .unwrap_or_else(|| panic!("no length in {head:?}"));
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok(Response {
            head,
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    }

    /// Reads one HTTP response, which must arrive.
    pub(crate) fn response(&mut self) -> Response {
        self.try_response().expect("a response arrives")
    }

    /// Requests `path` on this kept-alive connection and reads the response.
    pub(crate) fn get(&mut self, path: &str) -> Response {
        self.send(request(path));
        self.response()
    }
}

/// An HTTP request for `path` that keeps the connection alive.
pub(crate) fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n")
}

/// An HTTP response.
#[derive(Debug)]
pub(crate) struct Response {
    /// The head, including the empty line at its end.
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Response {
    /// The status code and reason phrase.
    pub(crate) fn status(&self) -> &str {
        self.head
            .split("\r\n")
            .next()
            .and_then(|line| line.strip_prefix("HTTP/1.1 "))
            .unwrap_or("")
    }
}
