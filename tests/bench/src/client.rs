//! Clients for protocols that wrk does not support, the same for every server.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

/// The time limit of an answer. A slower server counts as stuck.
const TIMEOUT: Duration = Duration::from_secs(30);

pub(crate) fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    configure(TcpStream::connect(address)?)
}

fn configure(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    Ok(stream)
}

/// Connects from a given loopback address.
pub(crate) fn connect_from(source: Ipv4Addr, address: SocketAddr) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.bind(&SocketAddr::from((source, 0)).into())?;
    socket.connect_timeout(&address.into(), TIMEOUT)?;
    configure(socket.into())
}

/// Sends `bytes` over each connection to an echo server and receives them concurrently.
///
/// Returns the seconds until the last byte has come back.
pub(crate) fn bulk(address: SocketAddr, connections: usize, bytes: usize) -> io::Result<f64> {
    const CHUNK: usize = 256 * 1024;
    let streams: Vec<TcpStream> = (0..connections)
        .map(|_| connect(address))
        .collect::<Result<_, _>>()?;
    let started = Instant::now();
    let transfer = |mut stream: TcpStream| {
        let mut writer = stream.try_clone()?;
        let sender = thread::spawn(move || {
            let chunk = vec![b'x'; CHUNK];
            for offset in (0..bytes).step_by(CHUNK) {
                writer.write_all(&chunk[..CHUNK.min(bytes - offset)])?;
            }
            writer.shutdown(Shutdown::Write)
        });
        let mut chunk = vec![0; CHUNK];
        let mut received = 0;
        loop {
            match stream.read(&mut chunk)? {
                0 => break,
                n => received += n,
            }
        }
        sender.join().expect("sending does not panic")?;
        match received == bytes {
            true => Ok(()),
            false => Err(io::Error::other(format!(
                "{received} of {bytes} bytes came back"
            ))),
        }
    };
    thread::scope(|scope| {
        let clients: Vec<_> = streams
            .into_iter()
            .map(|stream| scope.spawn(move || transfer(stream)))
            .collect();
        clients
            .into_iter()
            .try_for_each(|client| client.join().expect("receiving does not panic"))
    })?;
    Ok(started.elapsed().as_secs_f64())
}

/// Exchanges messages of `bytes` bytes with an echo server for `seconds`.
///
/// Returns the round-trip times in microseconds.
pub(crate) fn ping_pong(address: SocketAddr, bytes: usize, seconds: u32) -> io::Result<Vec<f64>> {
    let mut stream = connect(address)?;
    let (ping, mut pong) = (vec![b'x'; bytes], vec![0; bytes]);
    let mut times = Vec::new();
    let end = Instant::now() + Duration::from_secs(seconds.into());
    while Instant::now() < end {
        let sent = Instant::now();
        stream.write_all(&ping)?;
        stream.read_exact(&mut pong)?;
        times.push(micros_since(sent));
    }
    Ok(times)
}

/// Sends `request` to a server of lines `times` times, each on a new connection.
///
/// Returns the times from connecting to the answer, in microseconds.
pub(crate) fn ask(address: SocketAddr, request: &str, times: usize) -> io::Result<Vec<f64>> {
    let ask_once = |_| {
        let started = Instant::now();
        let mut stream = connect(address)?;
        stream.write_all(request.as_bytes())?;
        let mut answer = [0; 64];
        match stream.read(&mut answer)? {
            0 => Err(io::Error::other("no answer")),
            _ => Ok(micros_since(started)),
        }
    };
    (0..times).map(ask_once).collect()
}

/// Opens idle connections to an HTTP server. Each has been answered once.
pub(crate) fn open_idle(address: SocketAddr, connections: usize) -> io::Result<Vec<TcpStream>> {
    let open = |_| {
        let mut stream = connect(address)?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")?;
        let mut answer = [0; 4096];
        let mut length = 0;
        // The page ends with this tag and a line break.
        while !answer[..length].trim_ascii_end().ends_with(b"</html>") {
            match stream.read(&mut answer[length..])? {
                0 => return Err(io::Error::other("the answer is truncated")),
                n => length += n,
            }
        }
        Ok(stream)
    };
    (0..connections).map(open).collect()
}

fn micros_since(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1e6
}
