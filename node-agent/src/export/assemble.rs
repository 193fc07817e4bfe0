//! Reads every rank's payload once, front to back, each chunk checked, and writes its bytes to
//! their places in the file.

use tierkeep::{
    restore::read::Restorable,
    tier::{Payload, buffer::AlignedBuf},
};

use super::{
    Place, conflict,
    plan::{Output, Piece},
};
use crate::{fail::Failure, progress::Bar};

/// One piece and the tensor it belongs to, which begins at byte `base` of the file.
struct Job<'a> {
    output: &'a Output,
    piece: &'a Piece,
    base: u64,
}

/// Writes the tensors, each at its byte of the file.
pub(super) fn assemble(
    sources: &[Restorable],
    tensors: &[(&Output, u64)],
    place: &Place<'_>,
) -> Result<(), Failure> {
    let all = tensors.iter().flat_map(|(output, base)| {
        output.pieces.iter().map(|piece| Job { output, piece, base: *base })
    });
    let mut jobs: Vec<Job<'_>> = all.collect();
    jobs.sort_by_key(|job| (job.piece.source, job.piece.at));
    let bar = Bar::new("exporting", jobs.iter().map(|j| j.piece.at[1] - j.piece.at[0]).sum());
    let mut worker = Worker { sources, place, bar, back: Vec::new() };
    for (index, source) in sources.iter().enumerate() {
        let jobs: Vec<&Job<'_>> = jobs.iter().filter(|j| j.piece.source == index).collect();
        worker.source(source, &jobs)?;
    }
    Ok(())
}

struct Worker<'a> {
    sources: &'a [Restorable],
    place: &'a Place<'a>,
    bar: Bar,
    back: Vec<u8>,
}

impl Worker<'_> {
    /// `jobs` in the order of the payload.
    fn source(&mut self, source: &Restorable, jobs: &[&Job<'_>]) -> Result<(), Failure> {
        let info = &source.manifest().payload;
        let payload = source.payload();
        let mut buffer = AlignedBuf::new(1);
        let mut done = 0;
        for chunk in 0..info.chunks.len() {
            let begin = chunk as u64 * info.chunk_bytes;
            let end = begin + info.chunk_len(chunk);
            // Pieces of one payload do not overlap, so their ends rise too.
            done += jobs[done..].iter().take_while(|j| j.piece.at[1] <= begin).count();
            let here: Vec<_> = jobs[done..].iter().take_while(|j| j.piece.at[0] < end).collect();
            if here.is_empty() {
                continue;
            }
            let len = usize::try_from(end - begin).unwrap_or(usize::MAX);
            let bytes = payload.block(begin, len, &mut buffer)?;
            for job in here {
                let [from, to] = job.piece.at;
                let (from_here, to_here) = (from.max(begin), to.min(end));
                let part = |at: u64| usize::try_from(at - begin).unwrap_or(usize::MAX);
                self.put(job, from_here - from, &bytes[part(from_here)..part(to_here)])?;
                self.bar.add(to_here - from_here);
            }
        }
        Ok(())
    }

    /// `bytes` of a piece, from byte `at` of it.
    fn put(&mut self, job: &Job<'_>, mut at: u64, mut bytes: &[u8]) -> Result<(), Failure> {
        while !bytes.is_empty() {
            let (to, together) = job.piece.runs.place(at);
            let len = usize::try_from(together).unwrap_or(usize::MAX).min(bytes.len());
            let (now, rest) = bytes.split_at(len);
            match job.piece.same_as {
                None => self.place.write(now, job.base + to)?,
                Some(first) => self.compare(job, now, job.base + to, first)?,
            }
            at += len as u64;
            bytes = rest;
        }
        Ok(())
    }

    fn compare(
        &mut self,
        job: &Job<'_>,
        bytes: &[u8],
        at: u64,
        first: usize,
    ) -> Result<(), Failure> {
        self.back.resize(bytes.len(), 0);
        self.place.read(&mut self.back, at)?;
        if self.back == bytes {
            return Ok(());
        }
        Err(conflict(format!(
            "{} has different bytes on {} and {}",
            job.output.path, self.sources[first].rank, self.sources[job.piece.source].rank
        )))
    }
}
