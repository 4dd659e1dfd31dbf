//! TLS of a listener: its certificates, and the handshake with a client.

mod certificates;
mod error;
mod handshake_limit;
mod outcome;
mod settings;
mod stream;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{ServerConfig, ServerConnection};
use tracing::info;

use super::socket::Socket;
use crate::listener::Source;
use certificates::Certificates;
pub use error::{TlsError, TlsFile};
use handshake_limit::HandshakeLimit;
pub(super) use outcome::{HANDSHAKES, HandshakeOutcome};
pub use settings::{CertificateFiles, ClientAuth, MinVersion, TlsSettings};
use stream::HandshakeError;
pub(super) use stream::TlsStream;

/// TLS of a listener, with the files as they were last read.
pub struct Tls {
    settings: TlsSettings,
    config: ArcSwap<ServerConfig>,
    handshakes: HandshakeLimit,
}

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    ///
    /// [`TlsError`] with the first file that cannot be used, or the setting that was refused.
    pub fn new(settings: TlsSettings) -> Result<Self, TlsError> {
        Ok(Self {
            config: ArcSwap::new(server_config(&settings)?),
            handshakes: HandshakeLimit::new(settings.max_handshakes),
            settings,
        })
    }

    /// Reads the files again, for new connections.
    ///
    /// Open connections keep the certificates that they began with. Older sessions are not resumed:
    /// the files that authenticated their clients may have changed.
    ///
    /// # Errors
    ///
    /// As for [`Self::new`]. Nothing has changed then.
    pub fn reload(&self) -> Result<(), TlsError> {
        self.config.store(server_config(&self.settings)?);
        Ok(())
    }

    /// All files of the settings.
    pub fn files(&self) -> Vec<PathBuf> {
        let pairs = self.settings.pairs.iter().flat_map(|pair| {
            [Some(&pair.certificate), Some(&pair.key), pair.ocsp.as_ref()]
                .map(Option::<&PathBuf>::cloned)
        });
        let client_auth = self.settings.client_auth.iter();
        pairs
            .flatten()
            .chain(client_auth.map(|client_auth| client_auth.authorities.clone()))
            .collect()
    }

    /// Performs the handshake with a client of `source`.
    ///
    /// # Errors
    ///
    /// [`Refused`] with the reason and the socket.
    pub(super) async fn accept(
        &self,
        mut socket: Socket,
        source: Option<Source>,
    ) -> Result<Box<TlsStream>, Refused> {
        /// Record type of handshake messages (RFC 8446, section 5.1).
        const HANDSHAKE: u8 = 22;
        // A silent client takes neither a permit nor memory for TLS.
        match socket.first_byte().await {
            Ok(Some(HANDSHAKE)) => {}
            Ok(Some(byte)) => return Err(Refused::not_tls(socket, byte)),
            Ok(None) => {
                // A port scanner or a health check.
                return Err(Refused {
                    silent: true,
                    ..Refused::client_gone(socket, &io::ErrorKind::UnexpectedEof.into())
                });
            }
            Err(error) => return Err(Refused::client_gone(socket, &error)),
        }
        let _permit = self.handshakes.acquire(source).await;
        let session = match ServerConnection::new(self.config.load_full()) {
            Ok(session) => session,
            Err(error) => return Err(Refused::by_tls(socket, &error)),
        };
        let mut stream = Box::new(TlsStream::new(socket, session));
        match stream.perform_handshake().await {
            Ok(()) => Ok(stream),
            Err(HandshakeError::ClientGone(error)) => {
                Err(Refused::client_gone(stream.into_socket(), &error))
            }
            Err(HandshakeError::Refused(error)) => Err(Refused {
                alerted: true,
                ..Refused::by_tls(stream.into_socket(), &error)
            }),
        }
    }
}

/// A handshake that failed.
pub(super) struct Refused {
    /// The socket. The failure is logged before it is dropped.
    pub(super) socket: Socket,
    pub(super) outcome: HandshakeOutcome,
    pub(super) reason: String,
    /// The client was sent an alert, and needs time to read it.
    pub(super) alerted: bool,
    /// The client closed the connection without sending anything.
    pub(super) silent: bool,
}

impl Refused {
    fn new(socket: Socket, outcome: HandshakeOutcome, reason: String) -> Self {
        Self {
            socket,
            outcome,
            reason,
            alerted: false,
            silent: false,
        }
    }

    fn client_gone(socket: Socket, error: &io::Error) -> Self {
        let reason = format!("the client is gone: {error}");
        Self::new(socket, HandshakeOutcome::ClientGone, reason)
    }

    fn not_tls(socket: Socket, first_byte: u8) -> Self {
        let outcome = if first_byte.is_ascii_graphic() {
            HandshakeOutcome::PlainText
        } else {
            HandshakeOutcome::Bad
        };
        Self::new(socket, outcome, "the client does not speak TLS".into())
    }

    fn by_tls(socket: Socket, error: &rustls::Error) -> Self {
        let outcome = match error {
            rustls::Error::NoCertificatesPresented => HandshakeOutcome::NoClientCertificate,
            rustls::Error::InvalidCertificate(_) => HandshakeOutcome::BadClientCertificate,
            rustls::Error::PeerIncompatible(_) | rustls::Error::NoApplicationProtocol => {
                HandshakeOutcome::Incompatible
            }
            rustls::Error::AlertReceived(_) => HandshakeOutcome::RefusedByClient,
            _ => HandshakeOutcome::Bad,
        };
        Self::new(socket, outcome, error.to_string())
    }
}

fn server_config(settings: &TlsSettings) -> Result<Arc<ServerConfig>, TlsError> {
    let provider: Arc<CryptoProvider> = Arc::new(ring::default_provider());
    let certificates = Certificates::read(&settings.pairs, &provider)?;
    info!(
        names = certificates.names().join(","),
        "read the certificates of the server"
    );
    let versions = match settings.min_version {
        MinVersion::Tls12 => &[&TLS13, &TLS12][..],
        MinVersion::Tls13 => &[&TLS13],
    };
    let setup_error = |error: rustls::Error| TlsError::setup("setting up TLS", error);
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(setup_error)?;
    let builder = match &settings.client_auth {
        None => builder.with_no_client_auth(),
        Some(client_auth) => {
            let roots = Arc::new(certificates::authorities(&client_auth.authorities)?);
            let mut verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            if !client_auth.required {
                verifier = verifier.allow_unauthenticated();
            }
            let verifier = verifier
                .build()
                .map_err(|error| TlsError::setup("setting up client authentication", error))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_cert_resolver(Arc::new(certificates));
    config.alpn_protocols = settings
        .alpn
        .iter()
        .map(|name| name.as_bytes().into())
        .collect();
    // Tickets, which clients store, resume sessions: all threads would share a store on the server.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    match settings.client_auth {
        None => config.ticketer = ring::Ticketer::new().map_err(setup_error)?,
        // No resumption: it would admit a client whose certificate has expired meanwhile.
        Some(_) => config.send_tls13_tickets = 0,
    }
    Ok(Arc::new(config))
}
