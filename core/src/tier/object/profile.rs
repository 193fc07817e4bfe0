//! Profiles, as AWS's own tools keep them: `~/.aws/config` and `~/.aws/credentials`, and what chooses among
//! them.
//!
//! `object_store` reads the environment alone. Of the libraries that read these files, `aws-config` brings 26
//! packages and a second HTTP client, and `reqsign-aws-core` 13 and a second `quick-xml`; the latter says
//! nothing of region and endpoint, takes a profile that is not there for none, and splits a command at
//! spaces within quotes. The format is a page long, so it is read here.
//!
//! Not here: single sign-on and roles that another profile's keys assume. Both are a protocol of their own,
//! with files of their own; AWS's command line speaks them, and hands out the keys by `credential_process`.
//!
//! # Invariants
//!
//! - What the options say comes before the environment, the environment before a profile; keys in the
//!   environment come before `AWS_PROFILE`, and after `aws_profile`.
//! - A profile that was named and is not there is an error, never the next source's turn.
//! - No message has a value of a file in it: they are secrets.

use std::{collections::BTreeMap, io, path::PathBuf};

use super::address::Options;
use crate::error::{Error, Result};

/// Options of ours, beside those of `object_store`: what AWS's tools call the same in capitals.
pub(super) const OPTIONS: [&str; 3] =
    ["aws_profile", "aws_config_file", "aws_shared_credentials_file"];

type Settings = BTreeMap<String, String>;

/// Where to look, and for what.
#[derive(Clone, Debug)]
pub(super) struct Lookup {
    name: String,
    /// By an option, or the environment.
    pub(super) is_named: bool,
    /// By an option: it comes before keys in the environment.
    pub(super) is_option: bool,
    /// Each with whether it was named, and has to be there.
    config: (PathBuf, bool),
    credentials: (PathBuf, bool),
    ignores_endpoints: bool,
}

/// One profile, of both files together.
#[derive(Debug)]
pub(super) struct Profile {
    name: String,
    settings: Settings,
    /// What its `services` say of S3.
    endpoint_for_s3: Option<String>,
}

/// How a profile comes to its keys.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Keys {
    /// They stand there.
    Static { id: String, secret: String, token: Option<String> },
    /// A command says them.
    Process(String),
    /// A token in a file is exchanged for them.
    WebIdentity { token_file: String, role: String, session: Option<String> },
    /// It has none, and leaves them to this machine's identity service.
    Elsewhere,
}

impl Lookup {
    /// By options, or by what `var` knows of the environment.
    pub(super) fn new(options: &Options, var: &dyn Fn(&str) -> Option<String>) -> Self {
        let var = |name: &str| var(name).filter(|value| !value.is_empty());
        let home = var("HOME").map(PathBuf::from).or_else(std::env::home_dir).unwrap_or_default();
        let file = |option: &str, default: &str| {
            let named = options.get(option).cloned().or_else(|| var(&option.to_ascii_uppercase()));
            match named {
                Some(path) => match path.strip_prefix("~/") {
                    Some(rest) => (home.join(rest), true),
                    None => (path.into(), true),
                },
                None => (home.join(default), false),
            }
        };
        let option = options.get("aws_profile").cloned();
        let is_option = option.is_some();
        let named = option.or_else(|| var("AWS_PROFILE")).or_else(|| var("AWS_DEFAULT_PROFILE"));
        Self {
            is_named: named.is_some(),
            is_option,
            name: named.unwrap_or_else(|| "default".into()),
            config: file("aws_config_file", ".aws/config"),
            credentials: file("aws_shared_credentials_file", ".aws/credentials"),
            ignores_endpoints: var("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS")
                .is_some_and(|v| v.eq_ignore_ascii_case("true")),
        }
    }

    /// Reads both files as they are now.
    pub(super) fn load(&self) -> Result<Profile> {
        let config = sections(&self.config)?;
        let credentials = sections(&self.credentials)?;
        let name = &*self.name;
        // `[profile default]` is before `[default]`; what stands in credentials is before both.
        let bare = config.get(name).filter(|_| name == "default");
        let found = [bare, config.get(&format!("profile {name}")), credentials.get(name)];
        if self.is_named && found.iter().all(Option::is_none) {
            return Err(Error::invalid(format!(
                "there is no profile {name:?} in {} nor in {} (AWS_PROFILE, or the option aws_profile)",
                self.config.0.display(),
                self.credentials.0.display()
            )));
        }
        let settings: Settings =
            found.into_iter().flatten().flat_map(|section| section.clone()).collect();
        let services = settings.get("services");
        let services = services.and_then(|name| config.get(&format!("services {name}")));
        let endpoint_for_s3 = services.and_then(|s| s.get("s3.endpoint_url")).cloned();
        let mut profile = Profile { name: name.into(), settings, endpoint_for_s3 };
        if self.ignores_endpoints {
            profile.endpoint_for_s3 = None;
            profile.settings.remove("endpoint_url");
        }
        Ok(profile)
    }
}

impl Profile {
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn region(&self) -> Option<&String> {
        self.settings.get("region")
    }

    pub(super) fn endpoint(&self) -> Option<&String> {
        self.endpoint_for_s3.as_ref().or_else(|| self.settings.get("endpoint_url"))
    }

    /// How it comes to its keys.
    pub(super) fn keys(&self) -> Result<Keys> {
        let get = |name: &str| self.settings.get(name).cloned();
        let wrong = |why: String| Err(Error::invalid(format!("profile {:?} {why}", self.name)));
        if let Some(role) = get("role_arn") {
            return match get("web_identity_token_file") {
                Some(token_file) => {
                    Ok(Keys::WebIdentity { token_file, role, session: get("role_session_name") })
                }
                None => wrong(self.by_their_tools("assumes a role")),
            };
        }
        match (get("aws_access_key_id"), get("aws_secret_access_key")) {
            (Some(id), Some(secret)) => {
                return Ok(Keys::Static { id, secret, token: get("aws_session_token") });
            }
            (Some(_), None) => return wrong("has no aws_secret_access_key".into()),
            (None, Some(_)) => return wrong("has no aws_access_key_id".into()),
            (None, None) => {}
        }
        if let Some(command) = get("credential_process") {
            return Ok(Keys::Process(command));
        }
        if get("sso_session").is_some() || get("sso_start_url").is_some() {
            return wrong(self.by_their_tools("signs on (sso)"));
        }
        Ok(Keys::Elsewhere)
    }

    fn by_their_tools(&self, does: &str) -> String {
        format!(
            "{does}, which AWS's command line does for us: name a profile whose line is \
             `credential_process = aws configure export-credentials --profile {}`",
            self.name
        )
    }
}

/// The sections of a file, by their headings; of one that nobody named and that cannot be read, none.
fn sections((path, is_named): &(PathBuf, bool)) -> Result<BTreeMap<String, Settings>> {
    let text = match std::fs::read_to_string(path) {
        Err(e) if !is_named && e.kind() != io::ErrorKind::InvalidData => {
            // A home that is somebody else's, in a container, is as good as none.
            tracing::debug!("{} is not read: {e}", path.display());
            return Ok(BTreeMap::new());
        }
        Err(e) if e.kind() == io::ErrorKind::InvalidData => {
            return Err(Error::invalid(format!("{} is no text", path.display())));
        }
        other => other
            .map_err(|source| Error::Io { what: format!("read {}", path.display()), source })?,
    };
    parse(&text).map_err(|line| {
        Error::invalid(format!(
            "{}, line {line}: neither [profile] nor name = value",
            path.display()
        ))
    })
}

/// The error is the number of a line that is neither a heading nor a setting.
fn parse(text: &str) -> Result<BTreeMap<String, Settings>, usize> {
    let mut all = BTreeMap::<String, Settings>::new();
    let (mut section, mut above) = (None, String::new());
    for (number, line) in (1..).zip(text.trim_start_matches('\u{feff}').lines()) {
        let is_indented = line.starts_with([' ', '\t']);
        let line = line.trim();
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(heading) = line.strip_prefix('[').filter(|_| !is_indented) {
            let name = heading_name(heading.split_once(']').ok_or(number)?.0);
            all.entry(name.clone()).or_default();
            section = Some(name);
            continue;
        }
        // Before the first heading nothing is anybody's.
        let Some(settings) = section.as_ref().and_then(|name| all.get_mut(name)) else { continue };
        let Some((key, value)) = line.split_once('=') else {
            if is_indented {
                continue; // A value goes on: none of those that matter here does.
            }
            return Err(number);
        };
        let (key, value) = (key.trim().to_ascii_lowercase(), without_comment(value).trim());
        if is_indented && !above.is_empty() {
            settings.insert(format!("{above}.{key}"), value.into());
            continue;
        }
        above = if value.is_empty() { key.clone() } else { String::new() };
        settings.insert(key, value.into());
    }
    Ok(all)
}

/// `profile "a b"` is `profile a b`; spaces count once.
fn heading_name(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().map(|word| word.trim_matches('"')).collect();
    words.join(" ").trim_matches('\'').into()
}

/// A comment begins with a mark that follows a space.
fn without_comment(value: &str) -> &str {
    let marks = [" #", " ;", "\t#", "\t;"].map(|mark| value.find(mark).unwrap_or(value.len()));
    &value[..marks.into_iter().min().unwrap_or(value.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = "
# everybody's
[default]
region = eu-north-1

[profile lab]
region=eu-central-1   ; where it stands
endpoint_url = http://lab:9000
credential_process = \"/opt/my tools/keys\" --for 'the lab'
services = here
s3 =
  max_concurrent_requests = 20

[services here]
s3 =
    endpoint_url = http://s3.lab:9000
ec2 =
    endpoint_url = http://ec2.lab

[profile web]
role_arn = arn:aws:iam::1:role/r
web_identity_token_file = /token
[profile role]
role_arn = arn:aws:iam::1:role/r
source_profile = lab
[profile person]
sso_session = us
[profile half]
aws_access_key_id = K
";
    const CREDENTIALS: &str = "[default]\nAWS_ACCESS_KEY_ID = K\naws_secret_access_key = s+e/c=r#t\n
[  other ]\naws_access_key_id=L\naws_secret_access_key=m\naws_session_token = t\nregion = us-west-2\n";

    fn files() -> (tempfile::TempDir, Options) {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut options = Options::new();
        for (option, text) in
            [("aws_config_file", CONFIG), ("aws_shared_credentials_file", CREDENTIALS)]
        {
            let path = dir.path().join(option);
            std::io::Write::write_all(
                &mut std::fs::File::create(&path).expect("file"),
                text.as_bytes(),
            )
            .expect("write");
            options.insert(option.into(), path.display().to_string());
        }
        (dir, options)
    }

    fn profile(name: Option<&str>) -> Result<Profile> {
        let (_dir, options) = files();
        let env = |var: &str| name.filter(|_| var == "AWS_PROFILE").map(str::to_owned);
        Lookup::new(&options, &env).load()
    }

    #[test]
    fn a_profile_is_of_both_files_and_says_keys_region_and_endpoint() {
        let default = profile(None).expect("default");
        assert_eq!(default.region().expect("region"), "eu-north-1");
        assert_eq!(default.endpoint(), None);
        let keys = |id: &str, secret: &str, token: Option<&str>| Keys::Static {
            id: id.into(),
            secret: secret.into(),
            token: token.map(str::to_owned),
        };
        assert_eq!(default.keys().expect("keys"), keys("K", "s+e/c=r#t", None));
        let other = profile(Some("other")).expect("other");
        assert_eq!(other.keys().expect("keys"), keys("L", "m", Some("t")));
        assert_eq!(other.region().expect("region"), "us-west-2");
        let lab = profile(Some("lab")).expect("lab");
        assert_eq!(lab.region().expect("region"), "eu-central-1");
        assert_eq!(lab.endpoint().expect("endpoint"), "http://s3.lab:9000");
        let command = "\"/opt/my tools/keys\" --for 'the lab'";
        assert_eq!(lab.keys().expect("keys"), Keys::Process(command.into()));
        let web = profile(Some("web")).expect("web").keys().expect("keys");
        assert!(matches!(web, Keys::WebIdentity { token_file, .. } if token_file == "/token"));
    }

    #[test]
    fn what_a_profile_lacks_is_said_by_name_and_without_its_secrets() {
        for (name, words) in [
            ("nobody", ["no profile \"nobody\"", "AWS_PROFILE"]),
            ("role", ["assumes a role", "export-credentials --profile role"]),
            ("person", ["signs on (sso)", "export-credentials --profile person"]),
            ("half", ["\"half\"", "no aws_secret_access_key"]),
        ] {
            let e = profile(Some(name)).and_then(|profile| profile.keys()).expect_err(name);
            assert!(words.iter().all(|word| e.chain().contains(word)), "{name}: {}", e.chain());
        }
        assert_eq!(parse("[a]\nx = 1\nsecret\n").expect_err("no setting"), 3);
        assert_eq!(parse("[a\n").expect_err("no heading"), 1);
        assert!(parse("stray\n\n[a]\n continued\n").is_ok());
    }

    #[test]
    fn an_option_comes_before_the_environment_and_a_file_that_was_named_has_to_be_there() {
        let (_dir, mut options) = files();
        options.insert("aws_profile".into(), "other".into());
        let env = |var: &str| (var == "AWS_PROFILE").then(|| "lab".to_owned());
        let lookup = Lookup::new(&options, &env);
        assert!(lookup.is_option);
        assert_eq!(lookup.load().expect("load").name(), "other");
        options.insert("aws_config_file".into(), "/nowhere/config".into());
        let e = Lookup::new(&options, &env).load().map(drop).expect_err("it is not there");
        assert!(e.chain().contains("/nowhere/config"), "{}", e.chain());
        let home = |var: &str| (var == "HOME").then(|| "/nowhere".to_owned());
        let nothing = Lookup::new(&Options::new(), &home).load().expect("no files at all");
        assert_eq!(nothing.keys().expect("keys"), Keys::Elsewhere);
    }
}
