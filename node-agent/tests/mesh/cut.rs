//! A slot's file that somebody cuts short while a shard arrives in it. It is the run's user's own file, and
//! the agent has it mapped: a store where the file has ended would be the agent's end.

use std::{
    fs::File,
    io::{Read, Write},
    net::TcpStream,
    os::unix::fs::FileExt,
    path::PathBuf,
    time::Instant,
};

use crate::{
    offering::{Offering, file_in, head, put},
    world::PATIENCE,
};

/// The file that it arrives in.
fn slot(offering: &Offering) -> PathBuf {
    file_in(offering.b.ram.path(), ".slot").unwrap()
}

fn cut(offering: &Offering, len: u64) {
    File::options().write(true).open(slot(offering)).unwrap().set_len(len).unwrap();
}

/// All of it arrives, and is held.
fn arrives(offering: &Offering) {
    let ticket = offering.offer();
    let mut line = TcpStream::connect(offering.b.at).unwrap();
    for (index, chunk) in offering.chunks().into_iter().enumerate() {
        assert_eq!(put(&mut line, &ticket, index, chunk), 204, "chunk {index}");
    }
    assert_eq!(offering.finish(&ticket), Ok(vec![]));
    assert!(offering.held().unwrap() == offering.payload);
}

/// Sends a chunk of which the agent has taken a part when `between` is called; what it says.
fn put_in_two(ticket: &str, offering: &Offering, index: usize, between: impl FnOnce()) -> String {
    let chunk = offering.chunks()[index];
    let (first, last) = chunk.split_at(chunk.len() / 2);
    let mut line = TcpStream::connect(offering.b.at).unwrap();
    line.write_all(head(ticket, index, chunk.len()).as_bytes()).unwrap();
    line.write_all(first).unwrap();
    let (file, mut there) = (File::open(slot(offering)).unwrap(), vec![0; 1 << 20]);
    let begun = Instant::now();
    while there != first[..there.len()] {
        assert!(begun.elapsed() < PATIENCE, "nothing arrives");
        file.read_exact_at(&mut there, index as u64 * (4 << 20)).unwrap();
    }
    between();
    let mut said = String::new();
    // It may have hung up already.
    let _ = line.write_all(last).and_then(|()| line.read_to_string(&mut said));
    said
}

#[test]
fn a_slot_that_is_cut_short_while_a_chunk_arrives_costs_that_transfer_and_not_the_agent() {
    let offering = Offering::new(7);
    for len in [0, 4096, (4 << 20) + 5000, 6 << 20] {
        let ticket = offering.offer();
        let said = put_in_two(&ticket, &offering, 1, || cut(&offering, len));
        assert!(!said.starts_with("HTTP/1.1 204"), "cut to {len}: {said}");
        assert_eq!(offering.finish(&ticket), Ok(vec![0, 1, 2]), "cut to {len}");
        assert_eq!(offering.held(), None, "cut to {len}");
    }
    arrives(&offering);
}

#[test]
fn a_slot_that_is_cut_short_between_chunks_is_never_held_and_the_shard_arrives_in_another() {
    let offering = Offering::new(9);
    let ticket = offering.offer();
    let chunks = offering.chunks();
    let mut line = TcpStream::connect(offering.b.at).unwrap();
    for index in [0, 1] {
        assert_eq!(put(&mut line, &ticket, index, chunks[index]), 204);
    }
    cut(&offering, 5000);
    let again = offering.offer();
    assert_ne!(again, ticket, "what is left of it is of no use");
    for (index, chunk) in chunks.iter().enumerate() {
        assert_eq!(put(&mut line, &again, index, chunk), 204);
    }
    cut(&offering, 5000);
    let why = offering.finish(&again).unwrap_err();
    assert!(why.contains("has not"), "{why}");
    assert_eq!(offering.held(), None);
    arrives(&offering);
}
