//! Where a bucket is: one string, and options under the names that `object_store` uses.
//!
//! ```text
//! s3://bucket/prefix/run     AWS_* in the environment, options such as aws_endpoint, profiles in ~/.aws
//! gs://bucket/prefix/run     GOOGLE_*
//! az://container/prefix/run  AZURE_*
//! ```

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ClientConfigKey, RetryConfig,
    aws::{AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    path::Path,
};

use super::{
    ask::Store,
    create::{Creates, Way},
    credentials::{Credentials, OfProfile},
    explain::explain,
    hands::hands,
    library::Library,
    profile::{self, Keys, Lookup},
    s3::S3,
    wire::Wire,
};
use crate::error::{Error, Result};

/// Options by the names that `object_store` uses, as in `aws_endpoint`.
pub type Options = BTreeMap<String, String>;

/// Which protocol is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Amazon S3, and everything that speaks it.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage.
    Azure,
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::S3 => "s3",
            Self::Gcs => "gs",
            Self::Azure => "az",
        })
    }
}

/// A place in a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    scheme: Scheme,
    bucket: String,
    prefix: Path,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.bucket)?;
        if self.prefix.is_root() { Ok(()) } else { write!(f, "/{}", self.prefix) }
    }
}

/// Whether this is the address of a bucket and not a directory: `s3://...`.
#[must_use]
pub fn is_url(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| {
        !scheme.is_empty() && scheme.bytes().all(|b| b.is_ascii_alphanumeric())
    })
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = |why: &str| {
            Error::invalid(format!("{text:?} is no address: {why}, as in s3://bucket/prefix/run"))
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| wrong("it has no scheme"))?;
        let scheme = match scheme {
            "s3" => Scheme::S3,
            "gs" => Scheme::Gcs,
            "az" => Scheme::Azure,
            _ => return Err(wrong("the schemes are s3, gs, az and file")),
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(wrong("it names no bucket"));
        }
        if bucket.contains(['?', '#', '@', ':', '\\']) || prefix.contains(['?', '#', '\\']) {
            return Err(wrong("a bucket and a path are all that it can hold"));
        }
        let prefix = prefix.trim_end_matches('/');
        let is_bad = |part: &str| part.is_empty() || part == "." || part == "..";
        if !prefix.is_empty() && prefix.split('/').any(is_bad) {
            return Err(wrong("a part of its path is empty or made of dots"));
        }
        let prefix = Path::parse(prefix).map_err(|e| wrong(&e.to_string()))?;
        Ok(Self { scheme, bucket: bucket.into(), prefix })
    }
}

/// How an operation that failed by the network or the server is tried again by the library.
fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(5),
            base: 2.0,
        },
        max_retries: 6,
        retry_timeout: Duration::from_secs(60),
    }
}

/// The ways to one store.
pub(super) type Ways = (Store, Creates, Arc<dyn Wire>);

/// Not at all.
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..retries() }
}

/// What a client is told of the network: the same for our requests and the library's.
type Told<'a> = &'a dyn Fn(ClientConfigKey) -> Option<String>;

impl Address {
    /// The protocol.
    #[must_use]
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The bucket, or container.
    #[must_use]
    pub fn bucket(&self) -> &str {
        &self.bucket
    }

    /// Where in the bucket; no `/` at either end.
    #[must_use]
    pub(super) fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// Where the settings that matter come from, for messages.
    pub(super) fn hint(&self) -> String {
        let variables = match self.scheme {
            Scheme::S3 => {
                "AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_PROFILE and what else AWS_* says"
            }
            Scheme::Gcs => "GOOGLE_APPLICATION_CREDENTIALS and what else GOOGLE_* says",
            Scheme::Azure => "AZURE_STORAGE_ACCOUNT_NAME and what else AZURE_* says",
        };
        format!("{self}, with {variables}")
    }

    /// Opens the ways to the store. Nothing is asked of it yet.
    ///
    /// # Errors
    /// An option is unknown, or they do not fit together.
    pub(super) fn connect(&self, options: &Options) -> Result<Ways> {
        let failed = |e| explain(self, format!("use {self}"), e);
        let library = |inner| Store { inner, credentials: None };
        match self.scheme {
            Scheme::S3 => self.connect_s3(options),
            Scheme::Gcs => {
                let mut builder = GoogleCloudStorageBuilder::from_env();
                for (name, value) in options {
                    let key = GoogleConfigKey::from_str(name).map_err(failed)?;
                    builder = builder.with_config(key, value);
                }
                hands();
                let builder = builder.with_bucket_name(&self.bucket).with_retry(retries());
                let once = builder.clone().with_retry(no_retries()).build().map_err(failed)?;
                let store = Arc::new(builder.build().map_err(failed)?);
                let creates = Creates::new(Arc::new(once), None);
                Ok((library(store.clone()), creates, Arc::new(Library::new(store))))
            }
            Scheme::Azure => {
                let mut builder = MicrosoftAzureBuilder::from_env();
                for (name, value) in options {
                    let key = AzureConfigKey::from_str(name).map_err(failed)?;
                    builder = builder.with_config(key, value);
                }
                hands();
                let builder = builder.with_container_name(&self.bucket).with_retry(retries());
                let once = builder.clone().with_retry(no_retries()).build().map_err(failed)?;
                let store = Arc::new(builder.build().map_err(failed)?);
                let creates = Creates::new(Arc::new(once), None);
                Ok((library(store.clone()), creates, Arc::new(Library::new(store))))
            }
        }
    }
}

impl Address {
    fn connect_s3(&self, options: &Options) -> Result<Ways> {
        let failed = |e| explain(self, format!("use {self}"), e);
        let mut builder = AmazonS3Builder::from_env();
        for (name, value) in
            options.iter().filter(|(name, _)| !profile::OPTIONS.contains(&&***name))
        {
            let key = AmazonS3ConfigKey::from_str(name).map_err(failed)?;
            builder = builder.with_config(key, value);
        }
        let (mut builder, profile) = with_profile(builder, options)?;
        let endpoint = builder.get_config_value(&AmazonS3ConfigKey::S3Endpoint);
        let endpoint = endpoint.or_else(|| builder.get_config_value(&AmazonS3ConfigKey::Endpoint));
        if endpoint.is_some_and(|url| url.starts_with("http://")) {
            builder = builder.with_allow_http(true); // Written out: nothing more is to be asked.
        }
        hands(); // What TLS needs is installed there.
        let builder = builder.with_bucket_name(&self.bucket).with_retry(retries());
        let http = client(&|key| builder.get_config_value(&AmazonS3ConfigKey::Client(key)))?;
        let library = builder.clone();
        let credentials = Credentials::new(move || match &profile {
            Some(lookup) => Ok(Arc::new(OfProfile::new(lookup.clone()))),
            // A new one has nothing in its cache.
            None => library.clone().build().map(|store| store.credentials().clone()),
        });
        let credentials = Arc::new(credentials.map_err(failed)?);
        let way = match builder.get_config_value(&AmazonS3ConfigKey::ConditionalPut).as_deref() {
            Some("disabled") => Some(Way::Looks),
            _ => None,
        };
        let builder = builder.with_credentials(credentials.clone());
        let once = builder.clone().with_retry(no_retries()).build().map_err(failed)?;
        let creates = Creates::new(Arc::new(once), way);
        let store = builder.build().map_err(failed)?;
        let inner = Arc::new(store.clone());
        let wire = S3::new(store, credentials.clone(), http);
        Ok((Store { inner, credentials: Some(credentials) }, creates, Arc::new(wire)))
    }
}

/// Adds what a profile says and nobody else has said; where its keys are to be used, where they are found.
fn with_profile(
    mut builder: AmazonS3Builder,
    options: &Options,
) -> Result<(AmazonS3Builder, Option<Lookup>)> {
    use AmazonS3ConfigKey as Key;
    let lookup = Lookup::new(options, &|name| std::env::var(name).ok());
    let profile = lookup.load()?;
    if let Some(region) =
        profile.region().filter(|_| builder.get_config_value(&Key::Region).is_none())
    {
        builder = builder.with_region(region);
    }
    let has_endpoint =
        [Key::S3Endpoint, Key::Endpoint].iter().any(|key| builder.get_config_value(key).is_some());
    if let Some(endpoint) = profile.endpoint().filter(|_| !has_endpoint) {
        builder = builder.with_endpoint(endpoint);
    }
    let is_key = |name: &&String| {
        let key = Key::from_str(name);
        matches!(key, Ok(Key::AccessKeyId | Key::SecretAccessKey))
    };
    let given = options.keys().find(is_key);
    if let Some(key) = given.filter(|_| lookup.is_option) {
        return Err(Error::invalid(format!("aws_profile and {key}: one of them says the keys")));
    }
    let said = |key: Key| builder.get_config_value(&key);
    let has_keys = said(Key::AccessKeyId).is_some() || said(Key::SecretAccessKey).is_some();
    let unsigned = said(Key::SkipSignature).is_some_and(|said| said == "true");
    if unsigned || (has_keys && !lookup.is_option) {
        return Ok((builder, None));
    }
    // What the environment says of this machine's identity is before a default profile of no use here.
    let has_identity = [
        Key::WebIdentityTokenFile,
        Key::ContainerCredentialsRelativeUri,
        Key::ContainerCredentialsFullUri,
    ];
    let has_identity = has_identity.into_iter().any(|key| said(key).is_some());
    let keys = match profile.keys() {
        Err(_) if has_identity && !lookup.is_named => Keys::Elsewhere,
        other => other?,
    };
    if has_keys && !matches!(keys, Keys::Static { .. } | Keys::Process(_)) {
        let name = profile.name();
        return Err(Error::invalid(format!(
            "profile {name:?} has no keys of its own, and those of AWS_ACCESS_KEY_ID are not the profile's"
        )));
    }
    match keys {
        Keys::Static { .. } | Keys::Process(_) => Ok((builder, Some(lookup))),
        Keys::WebIdentity { token_file, role, session } => {
            builder = builder
                .with_config(Key::WebIdentityTokenFile, token_file)
                .with_config(Key::RoleArn, role);
            if let Some(session) = session {
                builder = builder.with_config(Key::RoleSessionName, session);
            }
            Ok((builder, None))
        }
        Keys::Elsewhere => Ok((builder, None)),
    }
}

/// A client for bodies that are streamed, which the library's own interface cannot send.
fn client(told: Told<'_>) -> Result<reqwest::Client> {
    let wrong = |e: reqwest::Error| Error::invalid(format!("the client's options: {e}"));
    let mut builder = reqwest::Client::builder()
        .http1_only() // Many streams over one connection share one flow's share of the network.
        .connect_timeout(Duration::from_secs(5))
        .user_agent(concat!("tierkeep/", env!("CARGO_PKG_VERSION")));
    if let Some(url) = told(ClientConfigKey::ProxyUrl) {
        let mut proxy = reqwest::Proxy::all(url).map_err(wrong)?;
        if let Some(excludes) = told(ClientConfigKey::ProxyExcludes) {
            proxy = proxy.no_proxy(reqwest::NoProxy::from_string(&excludes));
        }
        builder = builder.proxy(proxy);
    }
    if told(ClientConfigKey::AllowInvalidCertificates).is_some_and(|v| v == "true") {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    builder.build().map_err(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_bucket_and_a_path_and_nothing_else() {
        for (text, bucket, prefix) in
            [("s3://b/a/run", "b", "a/run"), ("gs://b", "b", ""), ("az://c/run/", "c", "run")]
        {
            let address: Address = text.parse().expect(text);
            assert_eq!((address.bucket(), address.prefix().as_ref()), (bucket, prefix));
            assert_eq!(address.to_string(), text.trim_end_matches('/'));
        }
        for bad in [
            "",
            "b/x",
            "s3:/b",
            "s3://",
            "s3:///x",
            "http://b/x",
            "s3://b//x",
            "s3://b/../x",
            "s3://b/a/./x",
            "s3://k:s@b/x",
            "s3://b/x?versionId=1",
            "s3://b/x#y",
            "s3://b/a\\b",
            "s3://b/a\nb",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad:?} was taken");
        }
        assert!(is_url("s3://b") && is_url("file:///x") && !is_url("/a/b") && !is_url("a/b://c"));
    }

    #[test]
    fn an_unknown_option_is_refused_by_name() {
        let address: Address = "s3://b/run".parse().expect("address");
        let options = Options::from([("aws_endpont".into(), "http://x".into())]);
        let e = address.connect(&options).map(drop).expect_err("a slip of the pen");
        assert!(e.chain().contains("aws_endpont"), "{}", e.chain());
    }
}
