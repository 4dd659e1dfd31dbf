//! TLS: what the server shows and asks for, and the handshake.

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
use rustls::ServerConfig;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use tracing::info;

use super::stream::MaybeTls;
use crate::listener::Source;
use certificates::Certificates;
pub use error::{TlsError, TlsFile};
use handshake_limit::HandshakeLimit;
pub(super) use outcome::{HANDSHAKES, HandshakeOutcome};
pub use settings::{CertificateFiles, ClientAuth, MinVersion, TlsSettings};
use stream::Failed;
pub(super) use stream::TlsStream;

/// TLS as it is spoken with each client: with what is in the files, as they were read last.
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
    /// [`TlsError::File`] with the file and what is wrong with it.
    pub fn new(settings: TlsSettings) -> Result<Self, TlsError> {
        Ok(Self {
            config: ArcSwap::new(config(&settings)?),
            handshakes: HandshakeLimit::new(settings.max_handshakes),
            settings,
        })
    }

    /// Reads the files once more, for connections that begin from now on. Those that are open go on with
    /// what they have. Sessions are not resumed that began before: who was let in by a file that has
    /// changed is asked again.
    ///
    /// # Errors
    ///
    /// As for [`Self::new`]. Nothing has changed then.
    pub fn reload(&self) -> Result<(), TlsError> {
        self.config.store(config(&self.settings)?);
        Ok(())
    }

    /// The files that it is made of.
    pub fn files(&self) -> Vec<PathBuf> {
        let of_pair = |pair: &CertificateFiles| {
            [Some(&pair.certificate), Some(&pair.key), pair.ocsp.as_ref()]
                .map(Option::<&PathBuf>::cloned)
        };
        let pairs = self.settings.pairs.iter().flat_map(of_pair);
        let clients = self.settings.client_auth.iter();
        pairs
            .flatten()
            .chain(clients.map(|clients| clients.authorities.clone()))
            .collect()
    }

    /// Goes through the handshake with a client of `source`.
    pub(super) async fn shake_hands(
        &self,
        channel: &mut MaybeTls,
        source: Option<Source>,
    ) -> Result<(), Refused> {
        let gone = |error: io::Error| {
            Refused::new(
                HandshakeOutcome::ClientGone,
                format!("it was gone: {error}"),
            )
        };
        // A client that is silent takes nothing but its place among all connections.
        let first = channel.socket().first_byte().await.map_err(gone)?;
        /// A record with a part of a handshake (RFC 8446, section 5.1).
        const HANDSHAKE: u8 = 22;
        match first {
            // Whoever looks whether we are there.
            None => {
                return Err(Refused {
                    silent: true,
                    ..gone(io::ErrorKind::UnexpectedEof.into())
                });
            }
            Some(HANDSHAKE) => {}
            Some(byte) => {
                let outcome = match byte.is_ascii_graphic() {
                    true => HandshakeOutcome::PlainText,
                    false => HandshakeOutcome::Bad,
                };
                return Err(Refused::new(outcome, "it does not speak TLS".into()));
            }
        }
        let _place = self.handshakes.acquire(source).await;
        // What cannot be set up is not the client's fault, and ends its connection alone.
        let refuse = |error: rustls::Error| Refused::new(outcome_of(&error), error.to_string());
        let secured = channel.secure(self.config.load_full()).map_err(refuse)?;
        match secured.shake_hands().await {
            Ok(()) => Ok(()),
            Err(Failed::Gone(error)) => Err(gone(error)),
            Err(Failed::Refused(error)) => Err(Refused {
                alerted: true,
                ..refuse(error)
            }),
        }
    }
}

/// Why a handshake came to nothing.
pub(super) struct Refused {
    pub(super) outcome: HandshakeOutcome,
    pub(super) reason: String,
    /// The client was alerted so, and is to have the time to read it.
    pub(super) alerted: bool,
    /// The client closed without a word.
    pub(super) silent: bool,
}

impl Refused {
    fn new(outcome: HandshakeOutcome, reason: String) -> Self {
        Self {
            outcome,
            reason,
            alerted: false,
            silent: false,
        }
    }
}

fn outcome_of(error: &rustls::Error) -> HandshakeOutcome {
    match error {
        rustls::Error::NoCertificatesPresented => HandshakeOutcome::NoClientCertificate,
        rustls::Error::InvalidCertificate(_) => HandshakeOutcome::BadClientCertificate,
        rustls::Error::PeerIncompatible(_) | rustls::Error::NoApplicationProtocol => {
            HandshakeOutcome::Incompatible
        }
        rustls::Error::AlertReceived(_) => HandshakeOutcome::RefusedByClient,
        _ => HandshakeOutcome::Bad,
    }
}

fn config(settings: &TlsSettings) -> Result<Arc<ServerConfig>, TlsError> {
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
    let internal = |error: rustls::Error| TlsError::setup("setting up TLS", error);
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(internal)?;
    let builder = match &settings.client_auth {
        None => builder.with_no_client_auth(),
        Some(clients) => {
            let roots = Arc::new(certificates::authorities(&clients.authorities)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            let verifier = match clients.required {
                true => verifier,
                false => verifier.allow_unauthenticated(),
            };
            let verifier = verifier.build();
            let verifier = verifier
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
    // Sessions are resumed by what clients keep. There is no store of them that all threads share.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    match settings.client_auth {
        None => config.ticketer = ring::Ticketer::new().map_err(internal)?,
        // A certificate is shown and checked each time: whoever resumes would be let in by one that has
        // expired.
        Some(_) => config.send_tls13_tickets = 0,
    }
    Ok(Arc::new(config))
}
