//! A place in the state tree as the name of a tensor, and back.
//!
//! Components are joined by `/`. A person reads `model/layers.0.weight` or `optim/state/17/exp_avg`
//! and is right; only what would be misread is escaped:
//!
//! | component | written |
//! |---|---|
//! | a str | as it is, but `~` is `~0`, `/` is `~1`, `#` is `~2` |
//! | a str that is empty, looks like an integer, or is `__metadata__` | `~s` before it |
//! | a position, or an int key that fits 64 bits | its decimal digits |
//! | any other key | `~v` and its JSON, escaped like a str |
//! | the root of the tree | `~r` |
//!
//! `#` stays free for boxes, which are named `path#n`; `__metadata__` belongs to safetensors.
//!
//! # Invariants
//!
//! - What was joined splits into the same keys.
//! - Two paths never share a name.
//! - What splits is joined to the same name, so a name has one spelling.

/// One step down the state tree.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A str key of a dict, or the name of a field.
    Str(String),
    /// A position in a list or tuple, or an int key of a dict.
    Index(i64),
    /// Any other key of a dict, as the JSON of its typed encoding.
    Other(String),
}

/// The name of the tree's root: a state that is a single tensor.
const ROOT: &str = "~r";

/// The name of the place at `keys`.
#[must_use]
pub fn join(keys: &[Key]) -> String {
    use std::fmt::Write as _;
    if keys.is_empty() {
        return ROOT.into();
    }
    let mut name = String::new();
    for (i, key) in keys.iter().enumerate() {
        if i > 0 {
            name.push('/');
        }
        match key {
            Key::Str(text) => {
                if would_be_misread(text) {
                    name.push_str("~s");
                }
                escape(text, &mut name);
            }
            Key::Index(index) => {
                let _ = write!(name, "{index}"); // A String takes everything.
            }
            Key::Other(json) => {
                name.push_str("~v");
                escape(json, &mut name);
            }
        }
    }
    name
}

/// The inverse of [`join`]; `None` where `name` is not a name that `join` makes.
#[must_use]
pub fn split(name: &str) -> Option<Vec<Key>> {
    if name == ROOT {
        return Some(Vec::new());
    }
    name.split('/').map(parse).collect()
}

fn parse(component: &str) -> Option<Key> {
    if let Some(json) = component.strip_prefix("~v") {
        return Some(Key::Other(unescape(json)?));
    }
    if let Some(text) = component.strip_prefix("~s") {
        return would_be_misread(text).then(|| Key::Str(text.into()));
    }
    if is_integer(component) {
        let digits = component.strip_prefix('-').unwrap_or(component);
        let canonical = component == "0" || !digits.starts_with('0');
        return component.parse().ok().filter(|_| canonical).map(Key::Index);
    }
    if would_be_misread(component) {
        return None;
    }
    Some(Key::Str(unescape(component)?))
}

/// A str that, written plainly, would mean something else. None of them holds a character that is
/// escaped.
fn would_be_misread(text: &str) -> bool {
    text.is_empty() || text == "__metadata__" || is_integer(text)
}

/// `-?[0-9]+`
fn is_integer(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
}

fn escape(text: &str, name: &mut String) {
    let mut rest = text;
    while let Some(at) = rest.find(['~', '/', '#']) {
        name.push_str(&rest[..at]);
        name.push_str(match rest.as_bytes()[at] {
            b'~' => "~0",
            b'/' => "~1",
            _ => "~2",
        });
        rest = &rest[at + 1..];
    }
    name.push_str(rest);
}

fn unescape(escaped: &str) -> Option<String> {
    if escaped.contains(['#', '/']) {
        return None;
    }
    let mut parts = escaped.split('~');
    let mut text = String::with_capacity(escaped.len());
    text.push_str(parts.next()?);
    for part in parts {
        text.push(match part.bytes().next()? {
            b'0' => '~',
            b'1' => '/',
            b'2' => '#',
            _ => return None,
        });
        text.push_str(&part[1..]);
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Short texts of the characters that matter: collisions, where there are any, are likely.
    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            4 => "[-~/#0-2srva]{0,4}",
            1 => "-?[0-9]{1,20}",
            1 => Just("__metadata__".to_owned()),
            2 => any::<String>(),
        ]
    }

    fn key() -> impl Strategy<Value = Key> {
        prop_oneof![
            text().prop_map(Key::Str),
            prop_oneof![-2_i64..3, any::<i64>()].prop_map(Key::Index),
            text().prop_map(Key::Other),
        ]
    }

    fn keys() -> impl Strategy<Value = Vec<Key>> {
        prop::collection::vec(key(), 0..4)
    }

    proptest! {
        #[test]
        fn what_was_joined_splits_into_the_same_keys(keys in keys()) {
            prop_assert_eq!(split(&join(&keys)), Some(keys));
        }

        #[test]
        fn two_paths_never_share_a_name(a in keys(), b in keys()) {
            prop_assert_eq!(join(&a) == join(&b), a == b);
        }

        #[test]
        fn what_splits_is_joined_to_the_same_name(
            name in prop_oneof!["[-~/#0-2srva]{0,6}", "[-~0-2sv]{0,3}", any::<String>()]
        ) {
            if let Some(keys) = split(&name) {
                prop_assert_eq!(join(&keys), name);
            }
        }
    }

    /// The property above draws at random; up to four characters of the seven that matter, this
    /// tries them all.
    #[test]
    fn every_short_name_has_one_spelling() {
        let mut names = vec![String::new()];
        for from in 0..4 {
            for name in names.clone().iter().filter(|n| n.len() == from) {
                names.extend("~/#-0sv".chars().map(|c| format!("{name}{c}")));
            }
        }
        assert_eq!(names.len(), 1 + 7 + 49 + 343 + 2401);
        let mut owners = std::collections::HashMap::new();
        for name in &names {
            if let Some(keys) = split(name) {
                assert_eq!(&join(&keys), name);
            }
            for key in [Key::Str(name.clone()), Key::Other(name.clone())] {
                let joined = join(std::slice::from_ref(&key));
                assert_eq!(split(&joined), Some(vec![key.clone()]));
                assert_eq!(owners.insert(joined, key), None);
            }
        }
    }

    #[test]
    fn names_are_as_the_table_says() {
        let name = |keys: &[Key]| join(keys);
        let str = |text: &str| Key::Str(text.into());
        assert_eq!(name(&[]), "~r");
        assert_eq!(name(&[str("model"), str("layers.0.weight")]), "model/layers.0.weight");
        assert_eq!(name(&[str("state"), Key::Index(17), str("17")]), "state/17/~s17");
        assert_eq!(name(&[Key::Index(-1), str("-1"), str("007")]), "-1/~s-1/~s007");
        assert_eq!(name(&[str("a/b"), str("~r"), str("x#0")]), "a~1b/~0r/x~20");
        assert_eq!(name(&[str(""), str("__metadata__")]), "~s/~s__metadata__");
        assert_eq!(name(&[Key::Other(r#"{"tuple":["a/b"]}"#.into())]), r#"~v{"tuple":["a~1b"]}"#);
        assert_eq!(name(&[str("\0🦀")]), "\0🦀");
    }

    #[test]
    fn what_join_does_not_make_does_not_split() {
        for name in
            ["", "/", "a//b", "a/~r", "~", "~3", "a#0", "007", "-0", "00", "~sa", "__metadata__"]
        {
            assert_eq!(split(name), None, "{name}");
        }
        assert_eq!(split("99999999999999999999"), None);
        assert_eq!(split("~v#"), None);
    }
}
