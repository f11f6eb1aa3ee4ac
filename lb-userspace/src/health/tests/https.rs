use std::{
    net::SocketAddr,
    process::{Child, Command},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use rustls::{
    HandshakeKind, ServerConfig,
    crypto::ring,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    server::WebPkiClientVerifier,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

use super::{GENEROUS, SHORT, Server, any_port, any_port_ipv6, failure, hang, time_waits, try_probe};
use crate::config::{Probe, Trust};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// An authority with a file that names it.
struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    file: tempfile::NamedTempFile,
}

impl Authority {
    fn new(name: &str) -> Self {
        let mut parameters = CertificateParams::new([]).unwrap();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), issuer.pem()).unwrap();
        Self { issuer, file }
    }

    fn trust(&self) -> Trust {
        Trust::in_file(self.file.path()).unwrap()
    }

    /// A server's certificate for `names`, changed by `change`.
    fn issue(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut parameters = CertificateParams::new(names).unwrap();
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        change(&mut parameters);
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        Identity {
            certificate_pem: certificate.pem(),
            certificate: certificate.into(),
            key,
        }
    }
}

struct Identity {
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    key: KeyPair,
}

impl Identity {
    fn server(self) -> ServerConfig {
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).unwrap();
        ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate], key)
            .unwrap()
    }
}

/// What servers see of a connection: the name asked for, how the handshake went, and the head of the request.
type Seen = Arc<Mutex<Vec<(Option<String>, Option<HandshakeKind>, String)>>>;

/// A TLS server that answers each request with `answer` and closes.
async fn server_at(address: SocketAddr, config: ServerConfig, answer: &'static [u8], seen: Seen) -> Server {
    let acceptor = TlsAcceptor::from(Arc::new(config));
    Server::start_at(address, move |stream| {
        let (acceptor, seen) = (acceptor.clone(), Arc::clone(&seen));
        async move {
            let Ok(mut stream) = acceptor.accept(stream).await else {
                return;
            };
            let head = read_head(&mut stream).await;
            let (_, connection) = stream.get_ref();
            let name = connection.server_name().map(str::to_owned);
            let kind = connection.handshake_kind();
            seen.lock().unwrap().push((name, kind, head));
            let _ = stream.write_all(answer).await;
            let _ = stream.shutdown().await;
        }
    })
    .await
}

async fn server(config: ServerConfig, answer: &'static [u8]) -> Server {
    server_at(any_port(), config, answer, Seen::default()).await
}

async fn read_head(stream: &mut TlsStream<TcpStream>) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    String::from_utf8(head).unwrap()
}

fn https(server_name: Option<&str>, trust: Trust) -> Probe {
    Probe::Https {
        port: None,
        path: "/healthz".into(),
        host: None,
        server_name: server_name.map(|name| ServerName::try_from(name.to_owned()).unwrap()),
        trust,
    }
}

/// The words of the failure against a server with this identity.
async fn refused(identity: Identity, what: Probe) -> String {
    let server = server(identity.server(), OK).await;
    failure(server.address, what, GENEROUS).await
}

#[tokio::test]
async fn a_certificate_for_the_backends_address_is_enough_and_no_name_is_sent() {
    let authority = Authority::new("ours");
    for (address, written) in [(any_port(), "127.0.0.1"), (any_port_ipv6(), "::1")] {
        let seen = Seen::default();
        let config = authority.issue(&[written], |_| {}).server();
        let server = server_at(address, config, OK, Arc::clone(&seen)).await;
        try_probe(server.address, https(None, authority.trust()), GENEROUS)
            .await
            .unwrap();
        let seen = seen.lock().unwrap();
        let [(name, _, head)] = &seen[..] else {
            panic!("{seen:?}")
        };
        assert_eq!(*name, None);
        assert!(head.starts_with("GET /healthz HTTP/1.1\r\n"), "{head}");
        assert!(
            head.contains(&format!("\r\nhost: {}\r\n", server.address)),
            "{head}"
        );
    }
}

#[tokio::test]
async fn the_server_name_is_asked_for_and_verified() {
    let authority = Authority::new("ours");
    for address in [any_port(), any_port_ipv6()] {
        let seen = Seen::default();
        let config = authority.issue(&["*.example.org"], |_| {}).server();
        let server = server_at(address, config, OK, Arc::clone(&seen)).await;
        let what = Probe::Https {
            port: None,
            path: "/".into(),
            host: Some("other.example.net".into()),
            server_name: Some(ServerName::try_from("www.example.org").unwrap()),
            trust: authority.trust(),
        };
        try_probe(server.address, what, GENEROUS).await.unwrap();
        let seen = seen.lock().unwrap();
        assert_eq!(seen[0].0.as_deref(), Some("www.example.org"));
        assert!(
            seen[0].2.contains("\r\nhost: other.example.net\r\n"),
            "{}",
            seen[0].2
        );
    }
}

#[tokio::test]
async fn a_certificate_from_another_authority_is_an_unknown_issuer() {
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let systems = Trust::of_system().unwrap();
    for trust in [other.trust(), systems] {
        let words = refused(ours.issue(&["127.0.0.1"], |_| {}), https(None, trust)).await;
        assert_eq!(
            words,
            "TLS handshake with ADDRESS: the certificate is from an unknown issuer"
        );
    }
    // The same name, but another key.
    let forged = Authority::new("ours");
    let words = refused(forged.issue(&["127.0.0.1"], |_| {}), https(None, ours.trust())).await;
    assert!(words.starts_with("TLS handshake with ADDRESS: "), "{words}");
}

#[tokio::test]
async fn a_certificate_for_another_name_is_named() {
    let authority = Authority::new("ours");
    let words = refused(
        authority.issue(&["www.example.org", "10.0.0.1"], |_| {}),
        https(Some("api.example.org"), authority.trust()),
    )
    .await;
    assert_eq!(
        words,
        "TLS handshake with ADDRESS: the certificate is not for api.example.org: it is for www.example.org, 10.0.0.1"
    );
    let words = refused(
        authority.issue(&["www.example.org"], |_| {}),
        https(None, authority.trust()),
    )
    .await;
    assert_eq!(
        words,
        "TLS handshake with ADDRESS: the certificate is not for 127.0.0.1: it is for www.example.org"
    );
    let words = refused(
        authority.issue(&[], |parameters| {
            parameters
                .distinguished_name
                .push(DnType::CommonName, "api.example.org");
        }),
        https(Some("api.example.org"), authority.trust()),
    )
    .await;
    assert_eq!(
        words,
        "TLS handshake with ADDRESS: the certificate is not for api.example.org: it has no name (subjectAltName)"
    );
}

#[tokio::test]
async fn a_certificate_out_of_its_time_is_named_with_the_moment() {
    let authority = Authority::new("ours");
    let words = refused(
        authority.issue(&["127.0.0.1"], |parameters| {
            parameters.not_before = rcgen::date_time_ymd(2019, 1, 1);
            parameters.not_after = rcgen::date_time_ymd(2020, 2, 3);
        }),
        https(None, authority.trust()),
    )
    .await;
    assert_eq!(
        words,
        "TLS handshake with ADDRESS: the certificate has expired at 2020-02-03T00:00:00Z"
    );
    let words = refused(
        authority.issue(&["127.0.0.1"], |parameters| {
            parameters.not_before = (SystemTime::now() + 400 * DAY).into();
            parameters.not_after = rcgen::date_time_ymd(9999, 12, 31);
        }),
        https(None, authority.trust()),
    )
    .await;
    assert!(
        words.starts_with("TLS handshake with ADDRESS: the certificate is not valid before 2"),
        "{words}"
    );
}

#[tokio::test]
async fn a_certificate_of_an_authority_is_not_that_of_a_server() {
    // What `openssl req -x509` makes: its own issuer, and an authority.
    let mut parameters = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let certificate = parameters.self_signed(&key).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), certificate.pem()).unwrap();
    let identity = Identity {
        certificate_pem: certificate.pem(),
        certificate: certificate.into(),
        key,
    };
    let words = refused(identity, https(None, Trust::in_file(file.path()).unwrap())).await;
    assert_eq!(
        words,
        "TLS handshake with ADDRESS: the certificate is that of an authority, not of a server"
    );
}

#[tokio::test]
async fn a_certificate_that_is_its_own_issuer_can_be_trusted_by_itself() {
    let parameters = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate = parameters.self_signed(&key).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), certificate.pem()).unwrap();
    let identity = Identity {
        certificate_pem: certificate.pem(),
        certificate: certificate.into(),
        key,
    };
    let server = server(identity.server(), OK).await;
    let trust = Trust::in_file(file.path()).unwrap();
    try_probe(server.address, https(None, trust), GENEROUS)
        .await
        .unwrap();
}

#[tokio::test]
async fn without_verification_every_certificate_will_do() {
    let authority = Authority::new("ours");
    let identity = authority.issue(&["www.example.org"], |parameters| {
        parameters.not_after = rcgen::date_time_ymd(2020, 2, 3);
    });
    let server = server(identity.server(), OK).await;
    for name in [None, Some("api.example.net")] {
        try_probe(server.address, https(name, Trust::Anybody), GENEROUS)
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn tls_1_2_is_spoken_too() {
    let authority = Authority::new("ours");
    let identity = authority.issue(&["127.0.0.1"], |_| {});
    let key = PrivateKeyDer::try_from(identity.key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![identity.certificate], key)
        .unwrap();
    let server = server(config, OK).await;
    for trust in [authority.trust(), Trust::Anybody] {
        try_probe(server.address, https(None, trust), GENEROUS)
            .await
            .unwrap();
    }
}

/// A resumed session shows no certificate: one that has expired since would never be noticed.
#[tokio::test]
async fn every_probe_sees_the_certificate() {
    let authority = Authority::new("ours");
    let seen = Seen::default();
    let config = authority.issue(&["127.0.0.1"], |_| {}).server();
    let server = server_at(any_port(), config, OK, Arc::clone(&seen)).await;
    for _ in 0..3 {
        try_probe(server.address, https(None, authority.trust()), GENEROUS)
            .await
            .unwrap();
    }
    let kinds: Vec<_> = seen.lock().unwrap().iter().map(|(_, kind, _)| *kind).collect();
    assert_eq!(kinds, [Some(HandshakeKind::Full); 3]);
}

#[tokio::test]
async fn answers_count_as_those_of_http() {
    let authority = Authority::new("ours");
    let cases: [(&[u8], Option<&str>); 6] = [
        (b"HTTP/1.1 204 No Content\r\n\r\n", None),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", None),
        (
            b"HTTP/1.1 503 So\r\nContent-Length: 0\r\n\r\n",
            Some("status 503"),
        ),
        (b"", Some("closed without a response")),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
            Some("closed within the body of the response"),
        ),
        (
            b"SSH-2.0-OpenSSH_9.2\r\n",
            Some("malformed response (invalid HTTP version parsed)"),
        ),
    ];
    for (answer, expected) in cases {
        let server = server(authority.issue(&["127.0.0.1"], |_| {}).server(), answer).await;
        let result = try_probe(server.address, https(None, authority.trust()), GENEROUS).await;
        let words = result
            .err()
            .map(|error| error.to_string().replace(&server.address.to_string(), "ADDRESS"));
        let expected = expected.map(|words| format!("GET https://ADDRESS/healthz: {words}"));
        assert_eq!(words, expected);
    }
}

#[tokio::test]
async fn what_does_not_speak_tls_is_named() {
    let plain = Server::start(async |mut stream: TcpStream| {
        let _ = stream
            .write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
            .await;
        hang(stream).await;
    })
    .await;
    let words = failure(plain.address, https(None, Trust::Anybody), GENEROUS).await;
    assert!(
        words.starts_with("TLS handshake with ADDRESS: what answers does not speak TLS ("),
        "{words}"
    );
    let closing = Server::start(async |mut stream: TcpStream| {
        let mut hello = [0; 4096];
        let _ = stream.read(&mut hello).await;
    })
    .await;
    let words = failure(closing.address, https(None, Trust::Anybody), GENEROUS).await;
    assert_eq!(words, "TLS handshake with ADDRESS: closed without a response");
}

#[tokio::test]
async fn servers_that_hang_time_out() {
    let silent = Server::start(hang).await;
    let words = failure(silent.address, https(None, Trust::Anybody), SHORT).await;
    assert_eq!(words, "TLS handshake with ADDRESS: timed out after 300ms");

    let authority = Authority::new("ours");
    let acceptor = TlsAcceptor::from(Arc::new(authority.issue(&["127.0.0.1"], |_| {}).server()));
    for answer in [&b""[..], b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"] {
        let acceptor = acceptor.clone();
        let server = Server::start(move |stream| {
            let acceptor = acceptor.clone();
            async move {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                read_head(&mut stream).await;
                let _ = stream.write_all(answer).await;
                let _ = stream.flush().await;
                read_head(&mut stream).await;
            }
        })
        .await;
        // Long enough for the handshake on a busy machine.
        let words = failure(
            server.address,
            https(None, authority.trust()),
            Duration::from_secs(2),
        )
        .await;
        assert_eq!(words, "GET https://ADDRESS/healthz: timed out after 2s");
    }
}

#[tokio::test]
async fn a_server_that_wants_the_clients_certificate_is_named() {
    let authority = Authority::new("ours");
    let identity = authority.issue(&["127.0.0.1"], |_| {});
    let Trust::Authorities(roots) = authority.trust() else {
        panic!("no authorities")
    };
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
        .build()
        .unwrap();
    let key = PrivateKeyDer::try_from(identity.key.serialize_der()).unwrap();
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate], key)
        .unwrap();
    let server = server(config, OK).await;
    let words = failure(server.address, https(None, authority.trust()), GENEROUS).await;
    // In TLS 1.3 the client is done with the handshake before the server says so.
    assert_eq!(
        words,
        "GET https://ADDRESS/healthz: the server refused it (CertificateRequired)"
    );
}

#[tokio::test]
async fn https_probes_leave_no_time_wait() {
    let authority = Authority::new("ours");
    // As a server that leaves closing to the client.
    let acceptor = TlsAcceptor::from(Arc::new(authority.issue(&["127.0.0.1"], |_| {}).server()));
    let server = Server::start(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            let mut stream = acceptor.accept(stream).await.unwrap();
            read_head(&mut stream).await;
            let _ = stream.write_all(OK).await;
            let _ = stream.flush().await;
            read_head(&mut stream).await;
        }
    })
    .await;
    for _ in 0..10 {
        try_probe(server.address, https(None, authority.trust()), GENEROUS)
            .await
            .unwrap();
    }
    assert_eq!(time_waits(server.address.port()), 0);
}

/// nginx, as users have it, until it is dropped.
struct Nginx(Child);

impl Nginx {
    /// Serves https on the port of both loopback addresses.
    fn start(folder: &std::path::Path, identity: &Identity, port: u16) -> Self {
        std::fs::write(folder.join("certificate.pem"), &identity.certificate_pem).unwrap();
        std::fs::write(folder.join("key.pem"), identity.key.serialize_pem()).unwrap();
        let configuration = format!(
            "daemon off; master_process off; pid nginx.pid; error_log error.log;
             events {{}}
             http {{
                access_log off;
                client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi;
                uwsgi_temp_path uwsgi; scgi_temp_path scgi;
                server {{
                    listen 127.0.0.1:{port} ssl; listen [::1]:{port} ssl;
                    ssl_certificate {0}/certificate.pem; ssl_certificate_key {0}/key.pem;
                    location /healthz {{ return 200 ok; }}
                }}
             }}",
            folder.display()
        );
        let file = folder.join("nginx.conf");
        std::fs::write(&file, configuration).unwrap();
        let child = Command::new("nginx")
            .arg("-p")
            .arg(folder)
            .arg("-c")
            .arg(&file)
            .args(["-e", "error.log"])
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn nginx_is_up_with_its_certificate_and_down_with_another_name() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new("ours");
    let identity = authority.issue(&["www.example.org"], |_| {});
    // Free at this moment, for both addresses.
    let port = std::net::TcpListener::bind(any_port_ipv6())
        .and_then(|listener| listener.local_addr())
        .unwrap()
        .port();
    let _nginx = Nginx::start(folder.path(), &identity, port);
    let addresses: [SocketAddr; 2] = [
        ([127, 0, 0, 1], port).into(),
        ([0, 0, 0, 0, 0, 0, 0, 1], port).into(),
    ];
    let started = std::time::Instant::now();
    while TcpStream::connect(addresses[1]).await.is_err() {
        assert!(started.elapsed() < GENEROUS, "nginx does not listen");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for address in addresses {
        let what = https(Some("www.example.org"), authority.trust());
        try_probe(address, what, GENEROUS).await.unwrap();
        let other = https(Some("api.example.org"), authority.trust());
        assert_eq!(
            failure(address, other, GENEROUS).await,
            "TLS handshake with ADDRESS: the certificate is not for api.example.org: it is for www.example.org"
        );
        // nginx says so in a page of its own: it has seen that this is no TLS.
        assert_eq!(
            failure(address, super::http("/healthz"), GENEROUS).await,
            "GET http://ADDRESS/healthz: status 400"
        );
    }
}

#[tokio::test]
async fn a_host_that_no_request_can_have_is_an_error_and_no_panic() {
    let authority = Authority::new("ours");
    let server = server(authority.issue(&["127.0.0.1"], |_| {}).server(), OK).await;
    let what = Probe::Https {
        port: None,
        path: "/with space".into(),
        host: Some("line\nfeed".into()),
        server_name: None,
        trust: Trust::Anybody,
    };
    let words = failure(server.address, what, GENEROUS).await;
    assert!(words.contains("the request cannot be built"), "{words}");
    // The plain probe of a TLS port: a server that closes without a word.
    let words = failure(server.address, super::http("/"), GENEROUS).await;
    assert!(words.starts_with("GET http://ADDRESS/: "), "{words}");
}
