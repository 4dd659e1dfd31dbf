//! Addresses and sockets: what the network and the kernel call things.

pub mod address;
pub mod cidr;
pub mod peer;
pub mod stream_socket;
pub mod unix_socket_file;

pub use address::{ListenAddress, ListenAddressError, TransportAddress};
pub use cidr::{Cidr, CidrError};
pub use peer::Peer;
pub use stream_socket::StreamSocket;
