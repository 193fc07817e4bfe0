//! The same for each of many, several at a time, on threads that come and go with the call.
//!
//! What is slow by waiting (a bucket, another node) takes many threads and no core; what is slow by working
//! takes as many as there are cores. They inherit the user that the calling thread acts as. Where no more
//! threads are to be had, those that there are do all.

use std::sync::{
    Mutex,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use crate::{
    error::{Error, Result},
    observe::locked,
    tier::{Tier, TierKind},
};

/// Requests to a bucket at once, where each answers a small question: a listing, a manifest.
const ASKED_OF_A_BUCKET: usize = 16;

/// How many small questions a tier is asked at once.
pub(crate) fn asked_of(tier: &dyn Tier) -> usize {
    if tier.kind() == TierKind::Object { ASKED_OF_A_BUCKET } else { 1 }
}

/// Does `deed` for each of `all`, `most` at a time; what came of it, in their order.
pub(crate) fn at_once<T: Sync, R: Send>(
    most: usize,
    all: &[T],
    deed: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let done = some_at_once(most, all, &AtomicBool::new(false), &deed);
    done.into_iter().map(|(_, result)| result).collect()
}

/// The same; after one that fails no other is begun.
///
/// # Errors
/// The first failure, in their order, of those that were met.
pub(crate) fn try_at_once<T: Sync, R: Send>(
    most: usize,
    all: &[T],
    deed: impl Fn(&T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    let failed = AtomicBool::new(false);
    let told = |one: &T| {
        let result = deed(one);
        failed.fetch_or(result.is_err(), Ordering::Relaxed);
        result
    };
    let done = some_at_once(most, all, &failed, &told);
    let done = done.into_iter().map(|(_, result)| result).collect::<Result<Vec<R>>>()?;
    match done.len() == all.len() {
        true => Ok(done),
        false => Err(Error::Bug("some of many were left out".into())),
    }
}

fn some_at_once<T: Sync, R: Send>(
    most: usize,
    all: &[T],
    over: &AtomicBool,
    deed: &(impl Fn(&T) -> R + Sync),
) -> Vec<(usize, R)> {
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(all.len()));
    let work = || {
        while !over.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(one) = all.get(index) else { return };
            let result = deed(one);
            locked(&done).push((index, result));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..most.min(all.len()) {
            let thread = std::thread::Builder::new().name("tierkeep-ask".into());
            if thread.spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    let mut done = std::mem::take(&mut *locked(&done));
    done.sort_unstable_by_key(|(index, _)| *index);
    done
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    #[test]
    fn each_is_done_once_several_at_a_time_and_told_in_order() {
        // Four meet: one after the other they would wait for ever.
        let meeting = Barrier::new(4);
        let all: Vec<u32> = (0..40).collect();
        let doubled = at_once(4, &all, |one| {
            meeting.wait();
            2 * one
        });
        assert_eq!(doubled, (0..40).map(|one| 2 * one).collect::<Vec<u32>>());
        assert!(at_once(4, &[] as &[u32], |one| *one).is_empty());
        assert_eq!(at_once(1, &[7], |one| *one), [7]);
    }

    #[test]
    fn after_one_that_fails_no_other_is_begun() {
        let all: Vec<usize> = (0..100).collect();
        let begun = AtomicUsize::new(0);
        let failed = try_at_once(1, &all, |one| {
            begun.fetch_add(1, Ordering::Relaxed);
            if *one < 3 { Ok(*one) } else { Err(Error::invalid(format!("{one} fails"))) }
        });
        assert_eq!(failed.unwrap_err().to_string(), "3 fails");
        assert_eq!(begun.into_inner(), 4);
        assert_eq!(try_at_once(3, &all, |one| Ok(*one)).unwrap(), all);
    }
}
