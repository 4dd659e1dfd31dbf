//! Addresses of listeners and of the two ends of a connection.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use socket2::{SockAddr, SockRef};

use super::unix_path::{LONGEST_PATH, directory_of};

/// Address of a listener, as the operator writes it.
#[derive(Clone, Debug, Eq, Hash, PartialEq)]
pub enum ListenAddress {
    /// An IP address and a TCP port.
    Ip(SocketAddr),
    /// A Unix socket, `unix:PATH`.
    Unix(PathBuf),
    /// Sockets that the parent process passed (systemd.socket(5)), `fd:NAME`.
    ///
    /// NAME is the name that the parent gave them. A name of digits only is a descriptor number.
    Passed(String),
}

impl ListenAddress {
    /// The local address of `socket`.
    ///
    /// # Errors
    ///
    /// Fails if `socket` is no socket, or has neither an IP address nor a path.
    pub fn of(socket: &impl AsFd) -> io::Result<Self> {
        match TransportAddress::local(socket)? {
            TransportAddress::Ip(address) => Ok(Self::Ip(address)),
            TransportAddress::Unix(Some(path)) => Ok(Self::Unix(path)),
            TransportAddress::Unix(None) => Err(io::ErrorKind::AddrNotAvailable.into()),
        }
    }

    /// Whether the kernel chooses the port (port 0). Several listeners can have such an address.
    pub fn takes_any_port(&self) -> bool {
        matches!(self, Self::Ip(address) if address.port() == 0)
    }

    /// Whether a listener at `other` keeps this address from being bound exclusively.
    pub fn is_taken_by(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Ip(this), Self::Ip(other)) => {
                let is_wildcard = this.ip().is_unspecified() || other.ip().is_unspecified();
                this.port() == other.port()
                    && this.port() != 0
                    && this.is_ipv4() == other.is_ipv4()
                    && (this.ip() == other.ip() || is_wildcard)
            }
            (Self::Unix(this), Self::Unix(other)) => this == other || is_same_file(this, other),
            (this, other) => this == other,
        }
    }
}

impl ListenAddress {
    /// Whether `service` takes over the sockets that `holder` has for the address `held`, when it asks for
    /// this address.
    ///
    /// Equal addresses mean the same sockets. But any free port means a port of one's own: only the
    /// holder itself gets that back.
    pub fn takes_over(&self, service: &str, held: &Self, holder: &str) -> bool {
        self == held && (!self.takes_any_port() || service == holder)
    }
}

/// Whether two paths have the same file name in the same directory.
fn is_same_file(a: &Path, b: &Path) -> bool {
    let directory = |path: &Path| directory_of(path).canonicalize();
    let same_name = a.file_name() == b.file_name();
    same_name && directory(a).is_ok_and(|a| directory(b).is_ok_and(|b| a == b))
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

/// Why a text is no [`ListenAddress`].
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum ListenAddressError {
    /// The text has none of the known forms.
    #[error(
        "not an IP address and a port, such as 127.0.0.1:7878 or [::1]:7878, nor unix: and a path, such as unix:/run/wasinetd.sock, nor fd: and the name of a socket that systemd passes"
    )]
    Unknown,
    /// The path is empty.
    #[error("there is no path; write one, such as unix:/run/wasinetd.sock")]
    NoPath,
    /// The name is in the abstract namespace (unix(7)).
    #[error(
        "an abstract Unix socket has no permissions: any user could connect to it; name a path, such as unix:/run/wasinetd.sock (or unix:./@NAME for a file whose name begins so)"
    )]
    Abstract,
    /// The path does not fit into a socket address.
    #[error(
        "the path is longer than the {LONGEST_PATH} bytes that the kernel takes; name a shorter one, such as one in /run, or a relative one"
    )]
    LongPath,
    /// The name is no valid `FileDescriptorName=` (systemd.socket(5)).
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

/// Address of one end of a connection.
#[derive(Clone, Debug, PartialEq)]
pub enum TransportAddress {
    /// An IP address and a TCP port.
    Ip(SocketAddr),
    /// A Unix socket, with its path unless it is unnamed.
    Unix(Option<PathBuf>),
}

impl TransportAddress {
    /// The local address of `socket`.
    ///
    /// # Errors
    ///
    /// Fails if `socket` is no socket.
    pub fn local(socket: &impl AsFd) -> io::Result<Self> {
        Ok(SockRef::from(socket).local_addr()?.into())
    }

    /// The address of the peer of `socket`.
    ///
    /// # Errors
    ///
    /// Fails if `socket` is no socket, or is not connected.
    pub fn remote(socket: &impl AsFd) -> io::Result<Self> {
        Ok(SockRef::from(socket).peer_addr()?.into())
    }
}

impl From<SocketAddr> for TransportAddress {
    fn from(address: SocketAddr) -> Self {
        Self::Ip(address)
    }
}

/// Any address without IP or path counts as an unnamed Unix socket.
impl From<SockAddr> for TransportAddress {
    fn from(address: SockAddr) -> Self {
        match address.as_socket() {
            Some(address) => Self::Ip(address),
            None => Self::Unix(address.as_pathname().map(PathBuf::from)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn written_addresses_are_parsed_back() {
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
    fn conflicting_addresses_are_detected() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().display();
        let [plain, dotted] = ["", "/./"].map(|more| format!("unix:{path}{more}/socket"));
        for (a, b, conflict) in [
            ("0.0.0.0:7", "127.0.0.1:7", true),
            ("127.0.0.1:7", "127.0.0.2:7", false),
            ("127.0.0.1:7", "[::]:7", false),
            ("127.0.0.1:0", "127.0.0.1:0", false),
            ("fd:a", "fd:a", true),
            (&plain, &dotted, true),
            (&plain, "unix:socket", false),
            ("unix:socket", "unix:./socket", true),
        ] {
            let [a, b] = [a, b].map(|text| text.parse::<ListenAddress>().unwrap());
            assert_eq!(a.is_taken_by(&b), conflict, "{a} {b}");
            assert_eq!(b.is_taken_by(&a), conflict, "{b} {a}");
        }
    }

    #[test]
    fn invalid_addresses_are_refused_with_a_reason() {
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

    #[test]
    fn socket_addresses_are_read_from_the_kernel() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let listening = TransportAddress::local(&listener).unwrap();
        assert_eq!(listening, listener.local_addr().unwrap().into());
        assert_eq!(TransportAddress::remote(&client).unwrap(), listening);
        assert!(TransportAddress::remote(&listener).is_err());
        let (unnamed, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let unix = TransportAddress::Unix(None);
        assert_eq!(TransportAddress::local(&unnamed).unwrap(), unix);
        assert!(ListenAddress::of(&unnamed).is_err());
    }
}
