//! What must be true of a run while nobody is at it. Only read: nothing here may finish what a job left half
//! done.

use tierkeep::{
    Error,
    names::CheckpointKey,
    reader::Reader,
    restore::decide::Wish,
    verify::{Depth, Finding, Gravity, verify, verify_records},
};

/// Every copy that a manifest speaks for is good in every byte, be its checkpoint complete or not;
/// a sealed one is complete. Attempt records too.
pub fn everything_is_whole(reader: &Reader) {
    let (records, all) = verify_records(reader).expect("records");
    let mut wrong = grave(&records.findings);
    let run_id = records.good.first().map(|r| r.run_id);
    for found in all.iter().filter(|f| !f.deleted()) {
        let verdict = verify(reader, found, run_id.as_ref(), Depth::Bytes, &|_| ());
        wrong.extend(grave(&verdict.findings));
        if found.sealed() && !verdict.is_good() {
            wrong.push(format!("{} is sealed, but not whole", found.key));
        }
    }
    assert!(wrong.is_empty(), "damaged, and nobody damaged it: {wrong:#?}");
}

fn grave(findings: &[Finding]) -> Vec<String> {
    let grave = findings.iter().filter(|f| f.gravity != Gravity::Note);
    grave.map(|f| format!("{}: {} ({:?})", f.file, f.why, f.gravity)).collect()
}

/// The checkpoint that a resume would take; it passes none over.
pub fn newest(reader: &Reader, world: u32) -> Option<CheckpointKey> {
    match reader.choose(&Wish::default()) {
        Ok((key, savers, passed_over)) => {
            assert!(passed_over.is_empty(), "passed over: {passed_over:?}");
            assert_eq!(savers, (0..world).collect::<Vec<_>>());
            Some(key)
        }
        Err(Error::NotFound { what }) => {
            assert!(what.starts_with("a complete checkpoint"), "{what}");
            None
        }
        Err(e) => panic!("{}", e.chain()),
    }
}
