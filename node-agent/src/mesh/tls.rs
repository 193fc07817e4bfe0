//! mTLS between agents: certificates from files, read again when these change.
//!
//! # Invariants
//!
//! - Both sides show a certificate that the cluster's authority signed, for the cluster's name.
//! - Files that cannot be read, or do not fit together, change nothing that works: they are told, and the
//!   certificate before them stays in use.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    server::WebPkiClientVerifier,
};
use tierkeep::clock::{Clock, SystemClock};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// The files, and the name that certificates are for.
#[derive(Clone, Debug)]
pub struct Files {
    /// This agent's certificate, and those between it and the authority's.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The name that every agent's certificate is for.
    pub name: String,
}

/// Certificates in use.
#[derive(Debug)]
pub struct Tls {
    files: Files,
    name: ServerName<'static>,
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    stamp: Stamp,
    looked: Duration,
}

/// When each file was changed, and how long it is.
type Stamp = [Option<(SystemTime, u64)>; 3];

impl Tls {
    /// Reads the files.
    ///
    /// # Errors
    /// One sentence that names the file.
    pub fn load(files: Files) -> Result<Self, String> {
        let name = ServerName::try_from(files.name.clone());
        let name = name.map_err(|_| format!("{:?} is no name for a certificate", files.name))?;
        let stamp = files.stamp();
        let (server, client) = files.read()?;
        let looked = SystemClock.monotonic();
        Ok(Self { files, name, now: Mutex::new(Now { server, client, stamp, looked }) })
    }

    /// Where they come from.
    #[must_use]
    pub fn files(&self) -> &Files {
        &self.files
    }

    /// The name that every agent's certificate is for.
    pub(super) fn name(&self) -> ServerName<'static> {
        self.name.clone()
    }

    pub(super) fn server(&self) -> Arc<ServerConfig> {
        self.current().0
    }

    pub(super) fn client(&self) -> Arc<ClientConfig> {
        self.current().1
    }

    fn current(&self) -> (Arc<ServerConfig>, Arc<ClientConfig>) {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let time = SystemClock.monotonic();
        if time.saturating_sub(now.looked) >= LOOK {
            now.looked = time;
            let stamp = self.files.stamp();
            if stamp != now.stamp {
                now.stamp = stamp;
                match self.files.read() {
                    Ok((server, client)) => {
                        tracing::info!("{} was read again", self.files.cert.display());
                        (now.server, now.client) = (server, client);
                    }
                    Err(why) => tracing::error!("the certificate before stays in use: {why}"),
                }
            }
        }
        (now.server.clone(), now.client.clone())
    }
}

impl Files {
    fn stamp(&self) -> Stamp {
        [&self.cert, &self.key, &self.ca].map(|path| {
            let meta = fs::metadata(path).ok()?;
            Some((meta.modified().ok()?, meta.len()))
        })
    }

    fn read(&self) -> Result<(Arc<ServerConfig>, Arc<ClientConfig>), String> {
        let at = |path: &Path, e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
        let certs = |path: &Path| -> Result<Vec<CertificateDer<'static>>, String> {
            let all = CertificateDer::pem_file_iter(path).map_err(|e| at(path, &e))?;
            let all: Vec<_> = all.collect::<Result<_, _>>().map_err(|e| at(path, &e))?;
            if all.is_empty() { Err(at(path, &"there is no certificate in it")) } else { Ok(all) }
        };
        let (chain, authorities) = (certs(&self.cert)?, certs(&self.ca)?);
        let key = || PrivateKeyDer::from_pem_file(&self.key).map_err(|e| at(&self.key, &e));
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots.add(authority).map_err(|e| at(&self.ca, &e))?;
        }
        let roots = Arc::new(roots);
        // Named, so that another provider in the same process changes nothing.
        let provider: Arc<CryptoProvider> = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|e| at(&self.ca, &e))?;
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key()?);
        let mut server = server.map_err(|e| at(&self.cert, &e))?;
        server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| e.to_string())?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key()?)
            .map_err(|e| at(&self.cert, &e))?;
        Ok((Arc::new(server), Arc::new(client)))
    }
}
