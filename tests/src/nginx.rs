//! A real nginx as a backend.

use std::{
    fs,
    net::SocketAddr,
    process::{Child, Stdio},
    time::Duration,
};

use tempfile::TempDir;
use xlb::lab::Namespace;

use crate::machine::{self, eventually};

/// Size of the file at `/big`, in bytes.
pub const BIG: usize = 16 << 20;

/// An nginx in a namespace, with a folder of its own; killed when dropped.
///
/// `/` and `/healthz` answer with its name, `/peer` with the address that it sees the client under, `/big` with
/// [`big_file`].
#[derive(Debug)]
pub struct Nginx<'a> {
    namespace: &'a Namespace,
    name: String,
    listen: SocketAddr,
    folder: TempDir,
    process: Option<Child>,
}

impl<'a> Nginx<'a> {
    pub fn start(namespace: &'a Namespace, name: &str, listen: SocketAddr) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::write(folder.path().join("big"), big_file()).expect("writing /big");
        let mut nginx = Self {
            namespace,
            name: name.to_owned(),
            listen,
            folder,
            process: None,
        };
        nginx.restart();
        nginx
    }

    /// Starts it, and returns once it takes connections.
    pub fn restart(&mut self) {
        self.kill();
        let folder = self.folder.path();
        let configuration = folder.join("nginx.conf");
        fs::write(&configuration, self.configuration()).expect("writing nginx.conf");
        let log = fs::File::create(folder.join("stderr")).expect("making a log");
        let process = self
            .namespace
            .command(machine::NGINX)
            .arg("-p")
            .arg(folder)
            .arg("-c")
            .arg(&configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("starting nginx");
        self.process = Some(process);
        let listen = self.listen;
        eventually("nginx listens", Duration::from_secs(10), || {
            let ended = self.process.as_mut().map(|process| process.try_wait());
            if let Some(Ok(Some(status))) = ended {
                let log = fs::read_to_string(self.folder.path().join("stderr")).unwrap_or_default();
                panic!("nginx {} has ended with {status}: {log}", self.name);
            }
            let connected = self
                .namespace
                .run(|| std::net::TcpStream::connect(listen).is_ok());
            connected.expect("a thread in the namespace")
        });
    }

    /// Ends it at once with SIGKILL: the kernel closes its connections.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // Both fail only when it has ended by itself.
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// One process, so that killing it ends all of it.
    fn configuration(&self) -> String {
        let (name, listen) = (&self.name, self.listen);
        let folder = self.folder.path().display();
        format!(
            "daemon off;
            master_process off;
            user root root;
            pid {folder}/pid;
            error_log stderr warn;
            events {{ worker_connections 4096; }}
            http {{
                access_log off;
                sendfile on;
                default_type text/plain;
                keepalive_timeout 1h;
                keepalive_requests 1000000;
                client_body_temp_path {folder}/body;
                proxy_temp_path {folder}/proxy;
                fastcgi_temp_path {folder}/fastcgi;
                uwsgi_temp_path {folder}/uwsgi;
                scgi_temp_path {folder}/scgi;
                server {{
                    listen {listen} backlog=4096;
                    location = / {{ return 200 '{name}\\n'; }}
                    location = /healthz {{ return 200 '{name}\\n'; }}
                    location = /peer {{ return 200 '$remote_addr'; }}
                    location = /big {{ alias {folder}/big; }}
                }}
            }}"
        )
    }
}

impl Drop for Nginx<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What `/big` holds: bytes of which no two stretches are alike (xorshift64).
pub fn big_file() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(BIG);
    while bytes.len() < BIG {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}
