//! Where to listen, as an operator writes it.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use socket2::SockRef;

use super::unix_socket_file::{LONGEST_PATH, directory_of};

/// Where to listen.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum ListenAddress {
    /// A TCP port.
    Ip(SocketAddr),
    /// A Unix socket, `unix:PATH`.
    Unix(PathBuf),
    /// Sockets that whoever started this process has passed to it (systemd.socket(5)), by the name they
    /// have there, `fd:NAME`. A name of digits only is the number of a descriptor instead.
    Passed(String),
}

impl ListenAddress {
    /// Where a socket is.
    ///
    /// # Errors
    ///
    /// Fails when it is no socket, or one with neither an IP address nor a path.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        let address = SockRef::from(socket).local_addr()?;
        let ip = address.as_socket().map(Self::Ip);
        let path = || address.as_pathname().map(|path| Self::Unix(path.into()));
        ip.or_else(path)
            .ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    }

    /// Whether it is any port that is free: several can listen there.
    pub fn takes_any_port(&self) -> bool {
        matches!(self, Self::Ip(address) if address.port() == 0)
    }

    /// Whether nobody can listen here who does not share it while somebody does at `other`.
    pub fn is_taken_by(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Ip(one), Self::Ip(other)) => {
                let is_all = one.ip().is_unspecified() || other.ip().is_unspecified();
                one.port() == other.port()
                    && one.port() != 0
                    && one.is_ipv4() == other.is_ipv4()
                    && (one.ip() == other.ip() || is_all)
            }
            (Self::Unix(one), Self::Unix(other)) => one == other || is_one_file(one, other),
            (one, other) => one == other,
        }
    }
}

/// Whether two paths have the same name in the same directory.
fn is_one_file(one: &Path, other: &Path) -> bool {
    let directory = |path: &Path| directory_of(path).canonicalize();
    let same_name = one.file_name() == other.file_name();
    same_name && directory(one).is_ok_and(|one| directory(other).is_ok_and(|other| one == other))
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Passed(name) => write!(f, "fd:{name}"),
        }
    }
}

/// What is wrong with the text of an [`Address`].
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum ListenAddressError {
    /// It is of no kind.
    #[error(
        "not an IP address and a port, such as 127.0.0.1:7878 or [::1]:7878, nor unix: and a path, such as unix:/run/wasinetd.sock, nor fd: and the name of a socket that systemd passes"
    )]
    Unknown,
    /// There is no path.
    #[error("there is no path; write one, such as unix:/run/wasinetd.sock")]
    NoPath,
    /// A name that is not in the file system.
    #[error(
        "an abstract Unix socket has no permissions: any user could connect to it; name a path, such as unix:/run/wasinetd.sock (or unix:./@NAME for a file whose name begins so)"
    )]
    Abstract,
    /// The kernel does not take it.
    #[error(
        "the path is longer than the {LONGEST_PATH} bytes that the kernel takes; name a shorter one, such as one in /run, or a relative one"
    )]
    LongPath,
    /// Not a name that a socket can have (systemd.socket(5), `FileDescriptorName=`).
    #[error(
        "the name of a passed socket is one to 255 ASCII characters without colons and control characters, such as fd:http"
    )]
    Name,
}

impl FromStr for ListenAddress {
    type Err = ListenAddressError;

    fn from_str(text: &str) -> Result<Self, ListenAddressError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err(ListenAddressError::NoPath),
                path if path.starts_with('@') => Err(ListenAddressError::Abstract),
                path if path.len() > LONGEST_PATH => Err(ListenAddressError::LongPath),
                path => Ok(Self::Unix(path.into())),
            };
        }
        if let Some(name) = text.strip_prefix("fd:") {
            let fits = |byte: u8| matches!(byte, b' '..=b'~') && byte != b':';
            return match (1..=255).contains(&name.len()) && name.bytes().all(fits) {
                true => Ok(Self::Passed(name.into())),
                false => Err(ListenAddressError::Name),
            };
        }
        let address = text.parse().map_err(|_| ListenAddressError::Unknown)?;
        Ok(Self::Ip(address))
    }
}

/// One end of a connection.
#[derive(Clone, Debug, PartialEq)]
pub enum TransportAddress {
    /// Of a TCP connection.
    Ip(SocketAddr),
    /// Of a Unix socket, with its path unless it has none.
    Unix(Option<PathBuf>),
}

impl From<SocketAddr> for TransportAddress {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        for text in [
            "127.0.0.1:7878",
            "[::1]:80",
            "unix:/run/a.sock",
            "unix:relative",
            "unix:./@name",
            "fd:http",
            "fd:a, b=c",
            "fd:3",
        ] {
            let address: ListenAddress = text.parse().unwrap();
            assert_eq!(address.to_string(), text);
        }
    }

    #[test]
    fn what_is_in_the_way_of_another_is_known() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().display();
        let [one, two] = ["", "/./"].map(|more| format!("unix:{path}{more}/socket"));
        for (one, other, taken) in [
            ("0.0.0.0:7", "127.0.0.1:7", true),
            ("127.0.0.1:7", "127.0.0.2:7", false),
            ("127.0.0.1:7", "[::]:7", false),
            ("127.0.0.1:0", "127.0.0.1:0", false),
            ("fd:a", "fd:a", true),
            (&one, &two, true),
            (&one, "unix:socket", false),
            ("unix:socket", "unix:./socket", true),
        ] {
            let [one, other] = [one, other].map(|text| text.parse::<ListenAddress>().unwrap());
            assert_eq!(one.is_taken_by(&other), taken, "{one} {other}");
            assert_eq!(other.is_taken_by(&one), taken, "{other} {one}");
        }
    }

    #[test]
    fn what_is_no_address_is_told() {
        let long = format!("unix:/{}", "a".repeat(LONGEST_PATH));
        let name = format!("fd:{}", "a".repeat(256));
        for (text, error) in [
            ("localhost:80", ListenAddressError::Unknown),
            ("/run/a.sock", ListenAddressError::Unknown),
            ("unix:", ListenAddressError::NoPath),
            ("unix:@abstract", ListenAddressError::Abstract),
            (&long, ListenAddressError::LongPath),
            ("fd:", ListenAddressError::Name),
            ("fd:a:b", ListenAddressError::Name),
            ("fd:a\nb", ListenAddressError::Name),
            (&name, ListenAddressError::Name),
        ] {
            assert_eq!(text.parse::<ListenAddress>(), Err(error), "{text}");
        }
    }
}
