//! Patterns for tensor names: `*` stands for any characters, also for `/`; `?` for one.

/// Whether all of `name` matches.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
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

#[cfg(test)]
mod tests {
    use super::matches;

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
}
