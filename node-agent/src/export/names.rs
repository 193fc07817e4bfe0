//! What a tensor is called in the file.

use tierkeep::state::path::{Key, split};

/// The name in the file; `None` where it does not lie below the prefix.
///
/// Without a prefix it is the escaped path. With one, what is left of it; where that is a single
/// key of a dict, the key as it was, which is what `load_state_dict` wants.
pub(super) fn name_in_file(path: &str, prefix: Option<&str>) -> Option<String> {
    let Some(prefix) = prefix.map(|p| p.trim_end_matches('/')).filter(|p| !p.is_empty()) else {
        return Some(path.into());
    };
    let rest = path.strip_prefix(prefix)?.strip_prefix('/')?;
    match split(rest).as_deref() {
        // Safetensors has that name for itself.
        Some([Key::Str(key)]) if key != "__metadata__" && !key.is_empty() => Some(key.clone()),
        _ => Some(rest.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_goes_and_a_single_key_is_as_it_was() {
        let name = |path, prefix| name_in_file(path, Some(prefix));
        assert_eq!(name_in_file("model/w", None).as_deref(), Some("model/w"));
        assert_eq!(name("model/w", "").as_deref(), Some("model/w"));
        assert_eq!(name("model/layers.0.w", "model").as_deref(), Some("layers.0.w"));
        assert_eq!(name("model/layers.0.w", "model/").as_deref(), Some("layers.0.w"));
        assert_eq!(name("model/a~1b", "model").as_deref(), Some("a/b"));
        assert_eq!(name("model/~s17", "model").as_deref(), Some("17"));
        assert_eq!(name("model/17/x", "model").as_deref(), Some("17/x"));
        assert_eq!(name("model/~s__metadata__", "model").as_deref(), Some("~s__metadata__"));
        assert_eq!(name("models/w", "model"), None);
        assert_eq!(name("model", "model"), None);
    }
}
