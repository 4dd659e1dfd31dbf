//! TLS: what the server shows and asks for, and the handshake.

mod certificates;
mod handshake_limit;
mod stream;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::crypto::{CryptoProvider, ring};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::version::{TLS12, TLS13};
use rustls::{Error as TlsError, ServerConfig};
use tracing::info;

use super::handshake::HandshakeOutcome;
use super::stream::MaybeTls;
use crate::Error;
use crate::listener::Source;
use certificates::Certificates;
use handshake_limit::HandshakeLimit;
use stream::Failed;
pub(super) use stream::TlsStream;

/// A certificate with its key.
#[derive(Clone, Debug, PartialEq)]
pub struct CertificateFiles {
    /// The file of the certificate, and of those that lead from it to one that clients know: PEM.
    pub certificate: PathBuf,
    /// The file of the private key: PEM, not encrypted.
    pub key: PathBuf,
    /// The file of an OCSP answer about the certificate: DER.
    pub ocsp: Option<PathBuf>,
}

/// The oldest version of TLS that is spoken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MinVersion {
    /// TLS 1.2 (RFC 5246). What is older is not to be used any more (RFC 8996).
    Tls12,
    /// TLS 1.3 (RFC 8446).
    Tls13,
}

/// What clients have to show.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientAuth {
    /// The file of the certificates that theirs have to lead to: PEM.
    pub authorities: PathBuf,
    /// Whether those that show none are refused.
    pub required: bool,
}

/// What is shown to clients, and asked of them.
#[derive(Clone, Debug, PartialEq)]
pub struct TlsSettings {
    /// One or more. The first is for clients that ask for a name that there is none for.
    pub pairs: Vec<CertificateFiles>,
    /// The protocols to be agreed on (ALPN, RFC 7301), in the order of preference. Without any, none
    /// is.
    pub alpn: Vec<String>,
    /// The oldest version that is spoken.
    pub min_version: MinVersion,
    /// What clients have to show, if anything.
    pub clients: Option<ClientAuth>,
    /// Handshakes at once.
    pub handshakes: usize,
}

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
    /// [`Error::Tls`] with the file and what is wrong with it.
    pub fn new(settings: TlsSettings) -> Result<Self, Error> {
        Ok(Self {
            config: ArcSwap::new(config(&settings)?),
            handshakes: HandshakeLimit::new(settings.handshakes),
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
    pub fn reload(&self) -> Result<(), Error> {
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
        let clients = self.settings.clients.iter();
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
                    said_nothing: true,
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
        let _place = self.handshakes.place(source).await;
        // What cannot be set up is not the client's fault, and ends its connection alone.
        let refuse = |error: TlsError| Refused::new(outcome_of(&error), error.to_string());
        let secured = channel.secure(self.config.load_full()).map_err(refuse)?;
        match secured.shake_hands().await {
            Ok(()) => Ok(()),
            Err(Failed::Gone(error)) => Err(gone(error)),
            Err(Failed::Refused(error)) => Err(Refused {
                told: true,
                ..refuse(error)
            }),
        }
    }
}

/// Why a handshake came to nothing.
pub(super) struct Refused {
    pub(super) outcome: HandshakeOutcome,
    pub(super) reason: String,
    /// The client was told so, and is to have the time to read it.
    pub(super) told: bool,
    /// The client closed without a word.
    pub(super) said_nothing: bool,
}

impl Refused {
    fn new(outcome: HandshakeOutcome, reason: String) -> Self {
        Self {
            outcome,
            reason,
            told: false,
            said_nothing: false,
        }
    }
}

fn outcome_of(error: &TlsError) -> HandshakeOutcome {
    match error {
        TlsError::NoCertificatesPresented => HandshakeOutcome::NoClientCertificate,
        TlsError::InvalidCertificate(_) => HandshakeOutcome::BadClientCertificate,
        TlsError::PeerIncompatible(_) | TlsError::NoApplicationProtocol => {
            HandshakeOutcome::Incompatible
        }
        TlsError::AlertReceived(_) => HandshakeOutcome::RefusedByClient,
        _ => HandshakeOutcome::Bad,
    }
}

fn config(settings: &TlsSettings) -> Result<Arc<ServerConfig>, Error> {
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
    let internal = |error: TlsError| Error::internal("setting up TLS", error);
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(versions)
        .map_err(internal)?;
    let builder = match &settings.clients {
        None => builder.with_no_client_auth(),
        Some(clients) => {
            let roots = Arc::new(certificates::authorities(&clients.authorities)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider);
            let verifier = match clients.required {
                true => verifier,
                false => verifier.allow_unauthenticated(),
            };
            let verifier = verifier.build();
            let verifier =
                verifier.map_err(|error| Error::internal("setting up --tls-client-ca", error))?;
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
    match settings.clients {
        None => config.ticketer = ring::Ticketer::new().map_err(internal)?,
        // A certificate is shown and checked each time: whoever resumes would be let in by one that has
        // expired.
        Some(_) => config.send_tls13_tickets = 0,
    }
    Ok(Arc::new(config))
}
