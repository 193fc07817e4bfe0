//! The same for each of many, several at a time, on threads that come and go with the call.
//!
//! What is slow by waiting (a bucket, another node) takes many threads and no core; what is slow by working
//! takes as many as there are cores. They inherit the user that the calling thread acts as.

use std::sync::{
    Mutex,
    atomic::{AtomicUsize, Ordering},
};

use crate::{
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
///
/// # Panics
/// Where a deed does.
pub(crate) fn at_once<T: Sync, R: Send>(
    most: usize,
    all: &[T],
    deed: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    if most.min(all.len()) <= 1 {
        return all.iter().map(deed).collect();
    }
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Vec::with_capacity(all.len()));
    let work = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(one) = all.get(index) else { return };
            let result = deed(one);
            locked(&done).push((index, result));
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..most.min(all.len()) {
            scope.spawn(work);
        }
    });
    let mut done = std::mem::take(&mut *locked(&done));
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
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
}
