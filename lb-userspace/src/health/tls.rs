//! TLS of probe `https`: the handshake, and why it failed, in words.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, SignatureScheme,
    client::{
        Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use super::{Failure, shortened};
use crate::config::Trust;

/// Shakes hands with the server at `address`, whose certificate has to be for `server_name`, or else the address.
pub(super) async fn handshake(
    stream: TcpStream,
    address: SocketAddr,
    server_name: Option<&ServerName<'static>>,
    trust: &Trust,
) -> Result<TlsStream<TcpStream>, Failure> {
    let config = client(trust).map_err(Failure::Tls)?;
    let name = server_name
        .cloned()
        .unwrap_or_else(|| ServerName::from(address.ip()));
    TlsConnector::from(Arc::new(config))
        .connect(name, stream)
        .await
        .map_err(|error| failure(&error).unwrap_or(Failure::Io(error)))
}

/// The failure of TLS, or the end of the connection, in an error of the stream.
pub(super) fn failure(error: &io::Error) -> Option<Failure> {
    if let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        return Some(Failure::Tls(tls.clone()));
    }
    (error.kind() == io::ErrorKind::UnexpectedEof).then_some(Failure::NoResponse)
}

/// Made for each probe: that costs microseconds, the handshake many times as much.
fn client(trust: &Trust) -> Result<ClientConfig, Error> {
    let provider = Arc::new(ring::default_provider());
    let builder =
        ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let mut config = match trust {
        Trust::Authorities(authorities) => builder.with_root_certificates(Arc::clone(authorities)),
        Trust::Anybody => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider))),
    }
    .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    // A resumed session would show no certificate: one that has expired meanwhile would go unnoticed.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Accepts every certificate; that the server has the key to it is still verified.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// What went wrong in the words of somebody who runs servers.
pub(super) fn in_words(error: &Error) -> String {
    let moment =
        |time: &UnixTime| humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(time.as_secs()));
    match error {
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the certificate is from an unknown issuer".to_owned()
        }
        Error::InvalidCertificate(CertificateError::ExpiredContext { not_after, .. }) => {
            format!("the certificate has expired at {}", moment(not_after))
        }
        Error::InvalidCertificate(CertificateError::NotValidYetContext { not_before, .. }) => {
            format!("the certificate is not valid before {}", moment(not_before))
        }
        Error::InvalidCertificate(CertificateError::NotValidForNameContext { expected, presented }) => {
            let others = match presented.as_slice() {
                [] => "it has no name (subjectAltName)".to_owned(),
                names => {
                    // Written like DnsName("www.example.org").
                    let inner = |name: &str| match name.split_once('(') {
                        Some((_, inner)) => inner.trim_end_matches(')').replace('"', ""),
                        None => name.to_owned(),
                    };
                    let names: Vec<String> = names.iter().map(|name| inner(name)).collect();
                    format!("it is for {}", shortened(&names.join(", ")))
                }
            };
            format!("the certificate is not for {}: {others}", expected.to_str())
        }
        Error::InvalidMessage(what) => format!("what answers does not speak TLS ({what:?})"),
        Error::AlertReceived(alert) => format!("the server refused it ({alert:?})"),
        // The type of webpki's own error is not in reach.
        other if other.to_string().contains("CaUsedAsEndEntity") => {
            "the certificate is that of an authority, not of a server".to_owned()
        }
        other => shortened(&other.to_string()),
    }
}
