//! Patterns for tensor names: `*` stands for any characters, also for `/`; `?` for one.

/// Whether all of `name` matches.
#[must_use]
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n) = (0, 0);
    // Where the last star was, and how far it has been taken to reach.
    let mut star = None;
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match &mut star {
                Some((at, reach)) => {
                    *reach += 1;
                    (p, n) = (*at + 1, *reach);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// Whether `path`, or a place that it lies below, matches: `model` and `model/*` are the whole of
/// `model`.
#[must_use]
pub fn covers(pattern: &str, path: &str) -> bool {
    let pattern = pattern.strip_suffix("/*").unwrap_or(pattern);
    let mut above = path.match_indices('/').map(|(end, _)| &path[..end]);
    matches(pattern, path) || above.any(|place| matches(pattern, place))
}

#[cfg(test)]
mod tests {
    use super::{covers, matches};

    #[test]
    fn a_star_is_anything_and_a_question_mark_one() {
        for (pattern, name) in [
            ("*", ""),
            ("*", "a/b"),
            ("model/*", "model/layers.0.weight"),
            ("*.weight", "model/layers.0.weight"),
            ("*/layers.?.*", "model/layers.0.weight"),
            ("a*b*c", "a-b-b-c"),
            ("w🦀?", "w🦀x"),
        ] {
            assert!(matches(pattern, name), "{pattern} {name}");
        }
        for (pattern, name) in
            [("", "a"), ("model/*", "optim/x"), ("a*b*c", "a-c-b"), ("?", ""), ("a", "ab")]
        {
            assert!(!matches(pattern, name), "{pattern} {name}");
        }
    }

    #[test]
    fn a_pattern_covers_what_lies_below_a_place_that_it_matches() {
        for pattern in ["model", "model/*", "*", "mod??", "model/0", "*/weight", "model/0/weight"] {
            assert!(covers(pattern, "model/0/weight"), "{pattern}");
        }
        for pattern in ["mode", "odel", "model/", "0", "model/0/weight/x", "weight"] {
            assert!(!covers(pattern, "model/0/weight"), "{pattern}");
        }
        assert!(covers("rng", "rng") && covers("rng/*", "rng"));
    }
}
