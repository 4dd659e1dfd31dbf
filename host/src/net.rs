//! Addresses and sockets, independent of what they are used for.

pub mod address;
pub mod cidr;
pub mod peer;
pub mod socket_permissions;
pub mod stream_socket;
pub(crate) mod unix_path;
pub mod unix_socket_file;

pub use address::{ListenAddress, ListenAddressError, TransportAddress};
pub use cidr::{Cidr, CidrError};
pub use peer::Peer;
pub use socket_permissions::{SocketMode, SocketOwner, SocketPermissions};
pub use stream_socket::StreamSocket;
pub use unix_socket_file::FileIdentity;
