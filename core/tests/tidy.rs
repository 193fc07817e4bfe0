//! What a review should not have to say: files stay small, lines stay short, nothing is left half
//! done, and every promise in `GUARANTEES.md` is a test.

use std::fs;
use std::path::{Path, PathBuf};

const FILE_LINES_MAX: usize = 600;
const LINE_CHARS_MAX: usize = 110;

/// Written in halves, so that this file does not trip over itself.
const BANNED: [&str; 5] = [
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X"),
    concat!("dbg", "!"),
    concat!("todo", "!"),
];

#[test]
fn sources_are_tidy() {
    let mut faults = Vec::new();
    for path in sources(&root(), &["rs", "py", "pyi"]) {
        let text = read(&path);
        let lines = text.lines().count();
        if lines > FILE_LINES_MAX {
            faults.push(format!("{}: {lines} lines, {FILE_LINES_MAX} at most", path.display()));
        }
        for (at, line) in text.lines().enumerate() {
            let place = format!("{}:{}", path.display(), at + 1);
            let chars = line.chars().count();
            if chars > LINE_CHARS_MAX && !line.contains("://") {
                faults.push(format!("{place}: {chars} characters, {LINE_CHARS_MAX} at most"));
            }
            for word in BANNED.into_iter().filter(|word| has_word(line, word)) {
                faults.push(format!("{place}: says {word}; do it, or write it down elsewhere"));
            }
        }
    }
    assert!(faults.is_empty(), "not tidy:\n{}", faults.join("\n"));
}

#[test]
fn every_guarantee_is_a_test() {
    let page = root().join("core/GUARANTEES.md");
    let tests: Vec<String> = ["core/tests", "core/src", "node-agent/tests", "python/tests"]
        .iter()
        .flat_map(|folder| sources(&root().join(folder), &["rs", "py"]))
        .map(|path| read(&path))
        .collect();
    let exists = |name: &str| {
        let heads = [format!("fn {name}("), format!("def {name}("), format!("def test_{name}(")];
        tests.iter().any(|text| heads.iter().any(|head| text.contains(head)))
    };

    let promises = bullets(&read(&page));
    assert!(!promises.is_empty(), "{} promises nothing", page.display());
    let mut faults = Vec::new();
    for promise in &promises {
        let names = test_names(promise);
        if names.is_empty() {
            faults.push(format!("names no test: {promise}"));
        }
        for name in names.into_iter().filter(|name| !exists(name)) {
            faults.push(format!("`{name}` does not exist: {promise}"));
        }
    }
    assert!(faults.is_empty(), "{}:\n{}", page.display(), faults.join("\n"));
}

/// The bullets of a page, each with the indented lines that continue it.
fn bullets(page: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut open = false;
    for line in page.lines() {
        if let Some(first) = line.strip_prefix("- ") {
            found.push(first.to_owned());
            open = true;
        } else if open && line.starts_with(' ') && !line.trim().is_empty() {
            let last = found.len() - 1;
            found[last].push(' ');
            found[last].push_str(line.trim());
        } else {
            open = false;
        }
    }
    found
}

/// A promise ends with its tests in brackets: "Nothing is lost. (`one_test`, `another_test`)".
fn test_names(promise: &str) -> Vec<&str> {
    let inside = promise.rsplit_once("(`").and_then(|(_, rest)| rest.trim().strip_suffix("`)"));
    inside.map(|names| names.split("`, `").collect()).unwrap_or_default()
}

/// Whether `word` stands in `line` by itself: not as a part of a longer name.
fn has_word(line: &str, word: &str) -> bool {
    let part_of_name = |char: char| char.is_alphanumeric() || char == '_';
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let begins = !before.is_some_and(part_of_name);
        let ends = word.ends_with('!') || !after.is_some_and(part_of_name);
        begins && ends
    })
}

/// Files with one of these suffixes, in order; what was built, installed or hidden is passed over.
fn sources(folder: &Path, suffixes: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(folder) else { return found };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with('.') || ["target", "build", "__pycache__"].contains(&name.as_str()) {
            continue;
        }
        if path.is_dir() && !path.is_symlink() {
            found.extend(sources(&path, suffixes));
        } else if path.extension().is_some_and(|suffix| suffixes.iter().any(|s| suffix == *s)) {
            found.push(path);
        }
    }
    found
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &Path) -> String {
    fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("could not read {}: {error}", path.display()))
}
